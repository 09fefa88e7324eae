"""The length-controlled win rate: the win rate if both sides' responses were equally long."""

from collections.abc import Sequence

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from align.evaluation.stats import Interval, cluster_numbers

RIDGE = 1.0
"""Precision of the normal prior on the length coefficient. It keeps the coefficient finite if only
length decides the pairs; with 400 prompts it changes the result by less than 1 %."""
TOLERANCE, MAX_STEPS = 1e-10, 100
MAX_LOGIT = 15.0


def length_controlled_win_rate(
    results: ArrayLike,
    length_differences: ArrayLike,
    *,
    clusters: Sequence[object] | None = None,
    level: float = 0.95,
) -> Interval | None:
    """Return the win rate without the effect of the length difference.

    Fits P(win) = sigmoid(quality + b tanh(d / s)), where d is the length difference and s its
    standard deviation. A result of 1/2 (a tie, or orders that disagree) counts half on each side.
    The win rate is sigmoid(quality), the prediction at d = 0. Its interval is Student's on the
    logit scale with the sandwich variance over clusters.

    Deviation from the reference: the reference also fits the difficulty of each instruction, shared
    by all models of a leaderboard. It is not identifiable with two models.

    Args:
        results: one value in [0, 1] per judged pair.
        length_differences: tokens of the first side's response minus those of the other.
        clusters: the prompt of each pair; None makes every pair its own cluster.
        level: confidence level, in (0, 1).

    Returns:
        Estimate and bounds; None if it is not identifiable: all results are 0, all are 1, or there
        are fewer than three clusters.

    Reference:
        arXiv:2404.04475 eq. 2; sandwich variance: Liang and Zeger 1986.
    """
    y = np.asarray(results, dtype=np.float64)
    d = np.asarray(length_differences, dtype=np.float64)
    if y.shape != d.shape:
        raise ValueError(f"{y.size} results, {d.size} lengths: not the same")
    index = cluster_numbers(range(y.size) if clusters is None else clusters, y.size)  # (pairs,)
    num_clusters = int(index.max()) + 1 if y.size else 0
    if num_clusters < 3 or y.max() == 0.0 or y.min() == 1.0:
        return None
    # Fit the logistic regression.
    spread = d.std()
    x = np.column_stack([np.ones_like(d), np.tanh(d / spread) if spread > 0 else np.zeros_like(d)])
    beta, hessian = _fit(x, y)
    scores = x * (y - scipy.special.expit(x @ beta))[:, None]  # (pairs, 2)
    error = _sandwich_error(scores, index, hessian)
    half = float(scipy.special.stdtrit(num_clusters - 1, 0.5 + level / 2.0)) * error
    value, low, high = (float(scipy.special.expit(beta[0] + shift)) for shift in (0.0, -half, half))
    return Interval(value, low, high)


def _sandwich_error(
    scores: NDArray[np.float64], index: NDArray[np.intp], hessian: NDArray[np.float64]
) -> float:
    """Return the first coefficient's standard error, with the score summed per cluster."""
    num_clusters = int(index.max()) + 1
    totals = np.zeros((num_clusters, 2))
    np.add.at(totals, index, scores)
    bread = np.linalg.inv(hessian)
    meat = totals.T @ totals * num_clusters / (num_clusters - 1)
    return float(np.sqrt((bread @ meat @ bread)[0, 0]))


def _fit(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the coefficients and the Hessian of the negative log posterior, by Newton's method."""
    prior = np.diag([0.0, RIDGE])
    beta = np.zeros(2)
    for _ in range(MAX_STEPS):
        p = scipy.special.expit(x @ beta)
        hessian = x.T @ (x * (p * (1.0 - p))[:, None]) + prior
        step = np.linalg.solve(hessian, x.T @ (y - p) - prior @ beta)
        # A win rate close to 0 or 1 has an unbounded intercept; sigmoid(15) is 1 - 3e-7.
        beta = np.clip(beta + step, -MAX_LOGIT, MAX_LOGIT)
        if np.abs(step).max() < TOLERANCE:
            break
    p = scipy.special.expit(x @ beta)
    return beta, x.T @ (x * (p * (1.0 - p))[:, None]) + prior
