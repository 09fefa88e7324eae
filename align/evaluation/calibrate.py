"""Measure a judge against human preferences: agreement, Cohen's kappa, position and length bias."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from align.core.types import Text
from align.evaluation.compare import Triple, as_triple, mean_interval
from align.evaluation.judge import BothOrders, Pair, position, side

Array = NDArray[np.float64]


def calibration(
    pairs: Sequence[Pair], said: Sequence[BothOrders], *, clusters: Sequence[Any]
) -> dict[str, Any]:
    """Return how well a judge agrees with human preferences, and its position and length bias.

    Args:
        pairs: the judged pairs; ``ours`` is the response that people preferred.
        said: the judge's verdicts in both orders.
        clusters: the prompt of each pair; pairs of one prompt are not independent.

    Returns:
        The counts ``pairs`` and ``invalid``, and with 95 % intervals: ``agreement`` (mean result,
        ties half), ``decided_agreement`` (of the pairs with the same winner in both orders),
        ``kappa``, ``first_share`` and ``consistent`` (see `position`), ``longer_share`` and
        ``human_longer_share`` (how often the longer response wins).
    """
    results = [p.result for p in said]
    # Length bias is measured on pairs whose responses differ in length.
    longer = [len(p.ours) > len(p.theirs) for p in pairs]
    unequal = [len(p.ours) != len(p.theirs) for p in pairs]
    won = [
        None if r is None or not u else (r if long else 1 - r)
        for r, long, u in zip(results, longer, unequal, strict=True)
    ]
    human = [float(long) if u else None for long, u in zip(longer, unequal, strict=True)]
    return {
        "pairs": len(pairs),
        "invalid": sum(r is None for r in results),
        "agreement": as_triple(mean_interval(results, clusters)),
        "decided_agreement": as_triple(mean_interval([p.winner for p in said], clusters)),
        "kappa": kappa_interval(said, clusters),
        **position(said, clusters),
        "longer_share": as_triple(mean_interval(won, clusters)),
        "human_longer_share": as_triple(mean_interval(human, clusters)),
    }


def kappa_interval(said: Sequence[BothOrders], clusters: Sequence[Any]) -> Triple:
    """Return Cohen's kappa of judge and people over both orders, with its jackknife interval.

    Every pair gives two observations: people prefer the first response in one order and the second
    in the other; the judge's verdict is first, second or tie. Invalid pairs are excluded.

    Reference:
        Cohen 1960, Educational and Psychological Measurement 20(1).
    """
    kept = [(p, name) for p, name in zip(said, clusters, strict=True) if p.result is not None]
    if not kept:
        return [None, None, None]
    names = sorted({str(name) for _, name in kept})
    index = {name: i for i, name in enumerate(names)}
    # Columns: observations, agreements, the judge's verdicts "first" and "second".
    counts = np.zeros((len(names), 4))  # (clusters, 4)
    for pair, name in kept:
        counts[index[str(name)]] += _counted(pair)
    value = _kappa(counts.sum(0))
    if len(names) < 2 or not np.isfinite(value):
        return [float(value) if np.isfinite(value) else None, None, None]
    # Delete-one-cluster jackknife.
    left_out = np.array([_kappa(counts.sum(0) - row) for row in counts])  # (clusters,)
    n = len(names)
    error = float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))
    half = float(stdtrit(n - 1, 0.975)) * error
    return [float(value), max(-1.0, float(value) - half), min(1.0, float(value) + half)]


def _counted(pair: BothOrders) -> Array:
    assert pair.ours_first is not None
    assert pair.theirs_first is not None
    a, b = side(pair.ours_first), side(pair.theirs_first)
    return np.array([2, (a > 0) + (b < 0), (a > 0) + (b > 0), (a < 0) + (b < 0)], float)


def _kappa(counts: Array) -> float:
    total, agreed, first, second = counts
    # People prefer first and second equally often, because every pair is shown in both orders.
    chance = 0.5 * (first + second) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        return float((agreed / total - chance) / (1.0 - chance))


def scored_orders(
    pairs: Sequence[Pair], score: Callable[[Sequence[Text], Sequence[str]], list[float | None]]
) -> list[BothOrders]:
    """Return the verdicts of a scorer of single responses; they do not depend on the order.

    Args:
        pairs: the pairs to compare.
        score: (prompts, responses) to one score each; None if a response cannot be scored.
    """
    prompts = [p.prompt for p in pairs]
    ours = score(prompts, [p.ours for p in pairs])
    theirs = score(prompts, [p.theirs for p in pairs])
    found = []
    for a, b in zip(ours, theirs, strict=True):
        won = None if a is None or b is None else (a > b) + 0.5 * (a == b)
        found.append(BothOrders(won, None if won is None else 1.0 - won))
    return found
