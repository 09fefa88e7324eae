"""Intervals of means over prompts: the studentized bootstrap, and Wilson's interval of fractions.

Both support pairs and clusters: several responses to one prompt are not independent evidence.
benchmarks/coverage.py measures how often they cover the true value. numpy and scipy only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist

import numpy as np
import scipy  # its parts load on use: most stages use none
from numpy.typing import ArrayLike, NDArray

MIN_SPREAD_FRAC = 0.9
"""Fraction of resamples that must have some spread for the bootstrap to be used."""
DRAW_CELLS = 1_000_000
"""Number of resampled cluster indices in memory at a time."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence bounds.

    Attributes:
        value: the estimate.
        low: lower bound; NaN for a single cluster, whose spread is unknown.
        high: upper bound.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often one side beats the other, with confidence bounds.

    Attributes:
        value: (wins + ties / 2) / comparisons.
        low: lower confidence bound; NaN for a single cluster, whose spread is unknown.
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
    """Return scores as a one-dimensional array.

    Raises:
        ValueError: the scores are empty, not one-dimensional or not finite.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: shape {array.shape}, expected a non-empty list of numbers")
    if not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(
            f"{name}[{where}] is {array[where]}, expected a finite number; "
            "exclude invalid scores on both sides and count them"
        )
    return array


def cluster_numbers(clusters: Sequence[object], num_scores: int) -> NDArray[np.intp]:
    """Return the number of each score's cluster (scores,), in order of first appearance.

    Raises:
        ValueError: there is not one cluster name for each score.
    """
    if len(clusters) != num_scores:
        raise ValueError(
            f"{len(clusters)} cluster names for {num_scores} scores; expected one each"
        )
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.intp)


def _cluster_sums(
    x: NDArray[np.float64], clusters: Sequence[object] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sum and the number of values of each cluster, in order of first appearance."""
    if clusters is None:
        return x, np.ones_like(x)
    index = cluster_numbers(clusters, x.size)
    sums, counts = np.bincount(index, weights=x), np.bincount(index)
    return sums.astype(np.float64), counts.astype(np.float64)


def _student(level: float, num_clusters: int) -> float:
    return float(scipy.special.stdtrit(num_clusters - 1, 0.5 + level / 2.0))


def _linearized_error(
    residuals: NDArray[np.float64], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the linearized standard error of sum / count over the last axis (clusters)."""
    n = residuals.shape[-1]
    return np.sqrt((residuals**2).sum(-1) * n / (n - 1)) / counts.sum(-1)


def _check(level: float, num_draws: int = 1) -> None:
    if not 0.0 < level < 1.0 or num_draws < 1:
        raise ValueError(f"level {level}, num_draws {num_draws}: expected (0, 1) and at least 1")


def _paired(a: ArrayLike, b: ArrayLike | None) -> NDArray[np.float64]:
    x = _scores("a", a)
    if b is None:
        return x
    other = _scores("b", b)
    if other.shape != x.shape:
        raise ValueError(f"{x.size} scores against {other.size}; expected pairs")
    return x - other


def standard_error(
    a: ArrayLike, b: ArrayLike | None = None, *, clusters: Sequence[object] | None = None
) -> float:
    """Return the standard error of the mean of ``a``, or of ``a - b``, by the cluster jackknife.

    It is NaN for a single cluster.

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    sums, counts = _cluster_sums(_paired(a, b), clusters)
    return _jackknife_error(sums, counts)


def _jackknife_error(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    n = sums.size
    if n == 1:
        return float("nan")
    # Jackknife variance: (n - 1) / n * sum of squared deviations of the means without one cluster.
    left_out = (sums.sum() - sums) / (counts.sum() - counts)  # (n,): the mean without each cluster
    return float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike | None = None,
    *,
    clusters: Sequence[object] | None = None,
    num_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the mean of ``a``, or of ``a - b``, with its studentized bootstrap interval.

    Whole clusters are resampled with replacement, because several responses to one prompt are not
    independent evidence. Each resample is divided by its own standard error, which keeps the
    coverage at 20 clusters, where percentiles of the resampled means are too narrow. If many
    resamples have no spread (a few differing values among many equal ones), the interval is
    Student's. If all clusters are equal, it is the value itself.

    Args:
        a: one finite score per response.
        b: scores of the other side on the same prompts in the same order; None compares with 0.
        clusters: cluster of each score (its prompt); None makes every score its own cluster.
        num_draws: number of resamples.
        seed: random seed; the same seed gives the same interval.
        level: confidence level, in (0, 1).

    Returns:
        Estimate and bounds.

    Raises:
        ValueError: lengths differ, ``a`` is empty, or a score is not finite.

    Reference:
        Davison and Hinkley 1997, Bootstrap Methods and their Application, section 5.2.1
        (studentized), 3.8 (clusters).
    """
    _check(level, num_draws)
    sums, counts = _cluster_sums(_paired(a, b), clusters)
    return ratio_bootstrap(sums, counts, num_draws=num_draws, seed=seed, level=level)


def ratio_bootstrap(
    sums: ArrayLike,
    counts: ArrayLike,
    *,
    num_draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return ``sum(sums) / sum(counts)`` over independent clusters; see `paired_bootstrap`.

    Args:
        sums: total of each cluster (the nats of a row, for example).
        counts: number of items in each total (the tokens of the row), above 0.
        num_draws: number of resamples.
        seed: random seed of the bootstrap.
        level: confidence level, in (0, 1).
    """
    _check(level, num_draws)
    totals, sizes = _scores("sums", sums), _scores("counts", counts)
    n, value = totals.size, float(totals.sum() / sizes.sum())
    if n == 1:
        return Interval(value, float("nan"), float("nan"))
    residuals = totals - value * sizes
    error = float(_linearized_error(residuals, sizes))
    # Without any spread the pivots are 0 / 0.
    if error <= 1e-12 * max(1.0, abs(value)):
        return Interval(value, value, value)
    pivots = _pivots(residuals, sizes, num_draws=num_draws, seed=seed)
    tail = (1.0 - level) / 2.0
    if pivots.size < MIN_SPREAD_FRAC * num_draws:
        upper = _student(level, n)
        lower = -upper
    else:
        lower, upper = np.quantile(pivots, (tail, 1.0 - tail))
    # Studentized bounds swap the quantiles; clamping at 0 keeps the estimate inside.
    return Interval(value, value - max(upper, 0.0) * error, value - min(lower, 0.0) * error)


def _pivots(
    residuals: NDArray[np.float64], sizes: NDArray[np.float64], *, num_draws: int, seed: int
) -> NDArray[np.float64]:
    """Return (resampled mean - mean) / its standard error for each resample that has spread."""
    rng = np.random.default_rng(seed)
    n = residuals.size
    step = max(1, DRAW_CELLS // n)
    smallest = 1e-9 * float(_linearized_error(residuals, sizes))
    # In chunks of `step` resamples, to bound the memory.
    found = []
    for start in range(0, num_draws, step):
        drawn = rng.integers(n, size=(min(step, num_draws - start), n))
        counts, moved = sizes[drawn], residuals[drawn]  # (step, n)
        shift = moved.sum(1) / counts.sum(1)
        errors = _linearized_error(moved - shift[:, None] * counts, counts)
        spread = errors > smallest
        found.append(shift[spread] / errors[spread])
    return np.concatenate(found)


def share_interval(
    x: ArrayLike,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    clusters: Sequence[object] | None = None,
    level: float = 0.95,
) -> Interval:
    """Return the mean of bounded values with a score interval for clustered data.

    This is Wilson's interval with Student's quantile and an effective number of trials: the number
    at which a fraction has the same standard error as these clusters (by the jackknife). It stays
    inside the bounds and works without spread: if all clusters are equal, Wilson's upper bound of
    0 in n limits the fraction of clusters that could differ, and these are assumed to be at one of
    the bounds.

    Args:
        x: one finite value per response, inside ``bounds``.
        bounds: lowest and highest possible value: (0, 1) of a fraction, (-1, 1) of a difference.
        clusters: cluster of each value (its prompt); None makes every value its own cluster.
        level: confidence level, in (0, 1).

    Raises:
        ValueError: a value is outside ``bounds``, or as `paired_bootstrap`.

    Reference:
        Wilson 1927; effective sample size with a t quantile: Korn and Graubard 1998, Survey
        Methodology 24, section 2.
    """
    _check(level)
    low, high = bounds
    values = _scores("x", x)
    if values.min() < low or values.max() > high:
        raise ValueError(f"values in [{values.min()}, {values.max()}], expected [{low}, {high}]")
    # Rescale to [0, 1]; the bounds are mapped back at the end.
    sums, counts = _cluster_sums((values - low) / (high - low), clusters)
    n, share = sums.size, float(sums.sum() / counts.sum())
    value = low + (high - low) * share
    if n == 1:
        return Interval(value, float("nan"), float("nan"))
    error, room = _jackknife_error(sums, counts), share * (1.0 - share)
    if error <= 1e-9:
        # All clusters are equal: bound the fraction of others by Wilson's interval of 0 in n.
        z = NormalDist().inv_cdf(0.5 + level / 2.0)
        others = z * z / (n + z * z)
        ends = (share - others * share, share + others * (1.0 - share))
    else:
        ends = _wilson(share, room / error**2, _student(level, n))
    return Interval(value, *(low + (high - low) * end for end in ends))


def _wilson(share: float, trials: float, z: float) -> tuple[float, float]:
    """Return Wilson's bounds of a fraction in ``trials`` trials, at the quantile ``z``."""
    room = share * (1.0 - share)
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * sqrt(max(room, 0.0) / trials + (z / (2 * trials)) ** 2)
    # Rounding must not exclude the estimate itself, as it could for a fraction of 0.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def win_rate(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    level: float = 0.95,
) -> WinRate:
    """Return how often ``scores_a`` beats ``scores_b``, with a tie as half a win.

    Args:
        scores_a: one finite score per response.
        scores_b: the other side's scores on the same prompts in the same order.
        clusters: cluster of each pair (its prompt); None makes every pair its own cluster.
        level: confidence level of the `share_interval`, in (0, 1).

    Raises:
        ValueError: lengths differ, the scores are empty, or a score is not finite.
    """
    a, b = _scores("scores_a", scores_a), _scores("scores_b", scores_b)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} scores against {b.size}; expected pairs")
    return win_rate_of((a > b) + 0.5 * (a == b), clusters=clusters, level=level)


def win_rate_of(
    results: ArrayLike, *, clusters: Sequence[object] | None = None, level: float = 0.95
) -> WinRate:
    """Return the win rate of judged pairs: above 1/2 is a win, 1/2 a tie, below 1/2 a loss.

    Args:
        results: one value in [0, 1] per pair, the mean over both orders.
        clusters: cluster of each pair (its prompt); None makes every pair its own cluster.
        level: confidence level of the `share_interval`, in (0, 1).
    """
    x = _scores("results", results)
    interval = share_interval(x, clusters=clusters, level=level)
    return WinRate(
        value=interval.value,
        low=interval.low,
        high=interval.high,
        wins=int((x > 0.5).sum()),
        ties=int((x == 0.5).sum()),
        losses=int((x < 0.5).sum()),
    )


def _reach(level: float, power: float) -> float:
    if not (0.0 < level < 1.0 and 0.0 < power < 1.0):
        raise ValueError(f"level {level}, power {power}: expected both in (0, 1)")
    normal = NormalDist()
    return normal.inv_cdf(0.5 + level / 2.0) + normal.inv_cdf(power)


def prompts_needed(
    difference: float,
    *,
    standard_error: float,
    num_prompts: int,
    level: float = 0.95,
    power: float = 0.8,
) -> int | None:
    """Return the number of prompts that detect a true difference with statistical power ``power``.

    The spread over prompts and the number of responses per prompt are assumed to stay the same.

    Args:
        difference: true distance from "no difference", in the unit of the metric.
        standard_error: standard error of the metric on the measured prompts.
        num_prompts: number of measured prompts.
        level: confidence level of the interval that must exclude "no difference".
        power: probability that it does.

    Returns:
        The number of prompts; None for a difference of 0, which cannot be detected.
    """
    if difference == 0.0:
        return None
    deviation = standard_error * num_prompts**0.5
    return max(2, ceil((_reach(level, power) * deviation / difference) ** 2))


def smallest_difference(*, standard_error: float, level: float = 0.95, power: float = 0.8) -> float:
    """Return the minimum detectable effect at statistical power ``power``."""
    return _reach(level, power) * standard_error
