"""Classification scores: accuracy and macro-F1 with intervals, and the confusion matrix."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.evaluation.stats import Interval, share_interval

NUM_DRAWS = 2000


def class_scores(
    labels: Sequence[int], predicted: Sequence[int], classes: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """Return the scores of a classifier's predictions.

    Args:
        labels: index of each row's true class, 0 .. C-1.
        predicted: index of each row's predicted class.
        classes: names of the C classes.
        seed: random seed of the bootstrap.

    Returns:
        ``accuracy`` and ``macro_f1`` as [value, low, high] at 95 %; ``confusion``, counts with the
        true class as row and the predicted class as column; ``classes`` with precision, recall, F1
        (None where the denominator is 0) and support (number of rows).
    """
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)  # (C, C): true, predicted
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
    """Return the mean F1 over the classes: (..., C, C) -> (...).

    A class without true and predicted rows has no F1 and is excluded from the mean.
    """
    # F1 = 2 TP / (2 TP + FP + FN) = 2 * diagonal / (row sum + column sum)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    rows = (confusion.sum(-1) + confusion.sum(-2)).astype(np.float64)
    f1 = np.divide(2.0 * hits, rows, out=np.zeros_like(hits), where=rows > 0)
    return f1.sum(-1) / (rows > 0).sum(-1)


def macro_f1_interval(
    confusion: NDArray[np.int64], *, seed: int, num_draws: int = NUM_DRAWS, level: float = 0.95
) -> Interval:
    """Return macro-F1 with its percentile interval from a bootstrap over rows.

    Sampling rows with replacement is the same as sampling the cells of the confusion matrix from a
    multinomial distribution.
    """
    total = int(confusion.sum())
    rng = np.random.default_rng(seed)
    cells = rng.multinomial(total, confusion.ravel() / total, size=num_draws)  # (draws, C * C)
    drawn = macro_f1(cells.reshape(num_draws, *confusion.shape))
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(macro_f1(confusion)), float(low), float(high))


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _triple(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]
