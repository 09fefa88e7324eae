"""Intervals for comparisons: the paired, clustered bootstrap and the win rate. numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAW_CELLS = 1_000_000
"""Resampled cluster numbers held in memory at a time."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Hold an estimate with its confidence bounds.

    Attributes:
        value: the estimate.
        low: lower bound; NaN where a single cluster says nothing about spread.
        high: upper bound.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class WinRate:
    """Hold how often one side beats the other.

    Attributes:
        value: (wins + ties / 2) / comparisons.
        low: lower confidence bound; NaN where a single cluster says nothing about spread.
        high: upper confidence bound.
        wins: comparisons in which the first side scored higher.
        ties: comparisons with equal scores.
        losses: comparisons in which the first side scored lower.
    """

    value: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def _scores(name: str, scores: ArrayLike) -> NDArray[np.float64]:
    """Check that scores are a non-empty list of finite numbers."""
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: shape {array.shape}, expected a non-empty list of numbers")
    if not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(
            f"{name}[{where}] is {array[where]}, expected a finite number; "
            "leave invalid scores out on both sides and count them"
        )
    return array


def _cluster_sums(
    x: NDArray[np.float64], clusters: Sequence[object] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give the sum and the number of values of each cluster, in order of first appearance."""
    if clusters is None:
        return x, np.ones_like(x)
    if len(clusters) != x.size:
        raise ValueError(f"{len(clusters)} cluster names for {x.size} scores; expected one each")
    numbers: dict[object, int] = {}
    index = np.array([numbers.setdefault(name, len(numbers)) for name in clusters])
    sums, counts = np.bincount(index, weights=x), np.bincount(index)
    return sums.astype(np.float64), counts.astype(np.float64)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike | None = None,
    *,
    clusters: Sequence[object] | None = None,
    num_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Give the mean of ``a``, or of ``a - b``, with its bootstrap percentile interval.

    Whole clusters are drawn with replacement, so that several answers to one prompt are not taken
    for independent evidence. With fewer than about 20 clusters the interval is too narrow.

    Args:
        a: one finite score per answer.
        b: scores of the other side on the same prompts in the same order; None compares with 0.
        clusters: what each score belongs to (its prompt); None makes each score its own.
        num_draws: resamples.
        seed: the same seed gives the same interval.
        level: confidence, in (0, 1).

    Returns:
        Estimate and bounds.

    Raises:
        ValueError: lengths differ, nothing is given, or a score is not finite.

    Reference:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3; resampling of
        clusters Davison and Hinkley 1997, section 3.8.
    """
    if not 0.0 < level < 1.0 or num_draws < 1:
        raise ValueError(f"level {level}, num_draws {num_draws}: expected (0, 1) and at least 1")
    x = _scores("a", a)
    if b is not None:
        other = _scores("b", b)
        if other.shape != x.shape:
            raise ValueError(f"{x.size} scores against {other.size}; expected pairs")
        x = x - other
    sums, counts = _cluster_sums(x, clusters)
    value = float(sums.sum() / counts.sum())
    if sums.size == 1:
        return Interval(value, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    step = max(1, DRAW_CELLS // sums.size)
    means = []
    for start in range(0, num_draws, step):
        drawn = rng.integers(sums.size, size=(min(step, num_draws - start), sums.size))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(means), (tail, 1.0 - tail))
    return Interval(value, float(low), float(high))


def _wilson(value: float, n: int, level: float) -> Interval:
    """Give the Wilson interval of a share measured on n independent trials."""
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    middle = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return Interval(value, middle - half, middle + half)


def win_rate(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    num_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> WinRate:
    """Count how often ``scores_a`` beats ``scores_b``, ties as half a win, with an interval.

    The interval is that of `paired_bootstrap`. Where every cluster came out alike (all won, say)
    resampling shows no spread at all; the bounds are then Wilson's for that many clusters.

    Args:
        scores_a: one finite score per answer.
        scores_b: the other side's scores on the same prompts in the same order.
        clusters: what each pair belongs to (its prompt); None makes each pair its own.
        num_draws: resamples.
        seed: the same seed gives the same interval.
        level: confidence, in (0, 1).

    Returns:
        Win rate, bounds and counts.

    Raises:
        ValueError: lengths differ, nothing is given, or a score is not finite.
    """
    a, b = _scores("scores_a", scores_a), _scores("scores_b", scores_b)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} scores against {b.size}; expected pairs")
    results = (a > b) + 0.5 * (a == b)
    interval = paired_bootstrap(
        results, clusters=clusters, num_draws=num_draws, seed=seed, level=level
    )
    sums, counts = _cluster_sums(results, clusters)
    if sums.size > 1 and np.ptp(sums / counts) == 0.0:
        interval = _wilson(interval.value, sums.size, level)
    return WinRate(
        value=interval.value,
        low=interval.low,
        high=interval.high,
        wins=int((a > b).sum()),
        ties=int((a == b).sum()),
        losses=int((a < b).sum()),
    )
