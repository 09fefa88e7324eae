"""How well texts are sorted into classes: accuracy, macro-F1 with intervals, and the mistakes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.evaluation.stats import Interval, share_interval

NUM_DRAWS = 2000


def class_scores(
    labels: Sequence[int], predicted: Sequence[int], classes: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """Sum up predictions.

    Args:
        labels: number of the right class of each row, 0 .. C-1. predicted: of the chosen class.
        classes: names of the C classes. seed: of the resampling.

    Returns:
        ``accuracy`` and ``macro_f1`` as [value, low, high] at 95 %; ``confusion``, whose row is
        the right class and column the chosen one, in rows; ``classes`` with precision, recall, F1
        (None where nothing is in or taken for the class) and support (rows).
    """
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (np.asarray(labels), np.asarray(predicted)), 1)
    accuracy = share_interval([float(a == b) for a, b in zip(labels, predicted, strict=True)])
    each = {
        name: {
            "precision": _share(confusion[i, i], confusion[:, i].sum()),
            "recall": _share(confusion[i, i], confusion[i].sum()),
            "f1": _share(2 * confusion[i, i], confusion[i].sum() + confusion[:, i].sum()),
            "support": int(confusion[i].sum()),
        }
        for i, name in enumerate(classes)
    }
    return {
        "accuracy": _triple(accuracy),
        "macro_f1": _triple(macro_f1_interval(confusion, seed=seed)),
        "confusion": confusion.tolist(),
        "classes": each,
    }


def macro_f1(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give the mean F1 of the classes: (..., C, C) -> (...).

    A class that no row is in or is taken for has none and is left out.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    rows = (confusion.sum(-1) + confusion.sum(-2)).astype(np.float64)
    f1 = np.divide(2.0 * hits, rows, out=np.zeros_like(hits), where=rows > 0)
    return f1.sum(-1) / (rows > 0).sum(-1)


def macro_f1_interval(
    confusion: NDArray[np.int64], *, seed: int, num_draws: int = NUM_DRAWS, level: float = 0.95
) -> Interval:
    """Give macro-F1 with the percentile interval of the bootstrap over rows.

    Drawing rows with replacement draws the cells of the confusion matrix from a multinomial.
    """
    total = int(confusion.sum())
    rng = np.random.default_rng(seed)
    cells = rng.multinomial(total, confusion.ravel() / total, size=num_draws)
    drawn = macro_f1(cells.reshape(num_draws, *confusion.shape))
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(macro_f1(confusion)), float(low), float(high))


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _triple(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]
