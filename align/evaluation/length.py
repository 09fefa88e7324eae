"""The win rate that would be, were the answers of both sides equally long."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import t as student_t

from align.evaluation.stats import Interval

RIDGE = 1.0
"""Precision of the normal prior on the length coefficient: one that only length decides stays
finite, and 400 prompts move it by less than 1 %."""
TOLERANCE, MAX_STEPS = 1e-10, 100
MAX_LOGIT = 15.0


def length_controlled_win_rate(
    results: ArrayLike,
    length_differences: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
) -> Interval | None:
    """Give the win rate with the part that length explains taken out.

    Fits P(win) = sigmoid(quality + b tanh(d / s)) with d the difference in length and s its
    standard deviation, a result of 1/2 (a tie, or orders that disagree) counted half on each side,
    and gives sigmoid(quality): the win rate at d = 0. The interval is Student's on the logit scale
    with the sandwich variance over clusters.

    Deviation from the reference: it also fits a difficulty for each instruction, shared by all
    models of a leaderboard; with two models there is nothing to learn it from.

    Args:
        results: one value in [0, 1] per judged pair.
        length_differences: tokens of the first side's answer minus the other's.
        clusters: the prompt of each pair; None makes each its own.
        level: confidence, in (0, 1).

    Returns:
        Estimate and bounds; None where it is not identified: all results alike at 0 or 1, or fewer
        than three clusters.

    Reference:
        arXiv:2404.04475 eq. 2; sandwich variance: Liang and Zeger 1986.
    """
    y = np.asarray(results, dtype=np.float64)
    d = np.asarray(length_differences, dtype=np.float64)
    names = np.arange(y.size) if clusters is None else np.asarray(clusters)
    if not y.shape == d.shape == names.shape:
        raise ValueError(f"{y.size} results, {d.size} lengths, {names.size} clusters: not the same")
    _, index = np.unique(names, return_inverse=True)
    num_clusters = int(index.max()) + 1 if y.size else 0
    if num_clusters < 3 or y.max() == 0.0 or y.min() == 1.0:
        return None
    spread = d.std()
    x = np.column_stack([np.ones_like(d), np.tanh(d / spread) if spread > 0 else np.zeros_like(d)])
    beta, hessian = _fit(x, y)
    scores = x * (y - expit(x @ beta))[:, None]
    totals = np.zeros((num_clusters, 2))
    np.add.at(totals, index, scores)
    bread = np.linalg.inv(hessian)
    meat = totals.T @ totals * num_clusters / (num_clusters - 1)
    error = float(np.sqrt((bread @ meat @ bread)[0, 0]))
    half = float(student_t.ppf(0.5 + level / 2.0, num_clusters - 1)) * error
    value, low, high = (float(expit(beta[0] + shift)) for shift in (0.0, -half, half))
    return Interval(value, low, high)


def _fit(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit by Newton's method; give the coefficients and the Hessian of the negative likelihood."""
    prior = np.diag([0.0, RIDGE])
    beta = np.zeros(2)
    for _ in range(MAX_STEPS):
        p = expit(x @ beta)
        hessian = x.T @ (x * (p * (1.0 - p))[:, None]) + prior
        step = np.linalg.solve(hessian, x.T @ (y - p) - prior @ beta)
        beta = np.clip(beta + step, -MAX_LOGIT, MAX_LOGIT)
        if np.abs(step).max() < TOLERANCE:
            break
    p = expit(x @ beta)
    return beta, x.T @ (x * (p * (1.0 - p))[:, None]) + prior
