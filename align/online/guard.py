"""The guard against reward over-optimization, based on held-out evaluations during training.

Pure functions of the history of evaluations. Every evaluation uses the same held-out prompts, so
everything is paired by prompt: a slope or a fit is computed per prompt, and its interval is that of
the mean over prompts. The intervals cover other prompts of the same kind, not other training runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray

from align.core.types import Alarm

LONGER, REPEATED, DOMINANT, DISAGREEING = 1.25, 0.1, 0.9, 2.0
"""Limits of the alarms: growth factor of the length, increase of the repeated-trigram fraction,
fraction of the training score's change due to one reward, growth of ensemble disagreement."""


class Interval(NamedTuple):
    """An estimate with its 95 % bounds, which are NaN for fewer than two prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation during training; lists have one entry per held-out prompt.

    Attributes:
        step: steps done. kl: KL to the reference in nats per response.
        proxy: training score. gold: score that training never sees. None if invalid.
        length: tokens. repetition: fraction of the response's word trigrams that are repeats.
        rewards: weighted mean of each training reward, by name.
        disagreement: mean spread among ensemble members; None without an ensemble.
    """

    step: int
    kl: float
    proxy: list[float | None]
    gold: list[float | None]
    length: list[float]
    repetition: list[float]
    rewards: dict[str, float]
    disagreement: float | None


class CurveFit(NamedTuple):
    """Fit of R(d) = d (alpha - beta log d) with d = sqrt(KL), and the KL of its maximum.

    ``top_kl`` is in nats per response; None if beta is not positive: there is no maximum.
    """

    alpha: Interval
    beta: Interval
    top_kl: float | None


def repeated_share(text: str) -> float:
    """Return the fraction of a text's word trigrams that are repeats; 0 below 3 words."""
    words = text.split()
    grams = list(zip(words, words[1:], words[2:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def over_prompts(values: NDArray[np.float64]) -> Interval:
    """Return the mean over prompts with Student's 95 % interval."""
    # One prompt has no spread over prompts: the mean is known, its interval is not.
    if values.size < 2:
        return Interval(float(values[0]) if values.size else math.nan, math.nan, math.nan)
    mean = float(values.mean())
    quantile = float(scipy.special.stdtrit(values.size - 1, 0.975))
    half = quantile * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Interval(mean, mean - half, mean + half)


def by_prompt(history: Sequence[Evaluation], *names: str) -> list[NDArray[np.float64]]:
    """Return fields as (evaluations, prompts), for prompts that are valid everywhere."""
    tables = [
        np.array([[math.nan if x is None else x for x in getattr(e, name)] for e in history])
        for name in names
    ]
    # (names, evaluations, prompts) -> (prompts,): paired over time, so a gap excludes the prompt.
    valid = ~np.isnan(np.stack(tables)).any(axis=(0, 1))
    return [table[:, valid] for table in tables]


def slope(values: NDArray[np.float64], xs: Sequence[float]) -> Interval:
    """Return the least-squares slope of (K, P) values over K positions, as a mean over prompts."""
    # sum((x - mean) y) / sum((x - mean)^2), for each column of values: (K,) @ (K, P) -> (P,).
    centered = np.asarray(xs, dtype=np.float64) - np.mean(xs)
    return over_prompts(centered @ values / (centered @ centered))


def fit_curve(kl: Sequence[float], gains: NDArray[np.float64]) -> CurveFit | None:
    """Return the fit of R(d) = d (alpha - beta log d) to the gains of a score.

    Args:
        kl: (K,) nats per response; entries with KL <= 0 are left out.
        gains: (K, P) score minus the score before the first step.

    Returns:
        None with fewer than three entries, which two parameters always fit, or without prompts.

    Reference:
        arXiv:2210.10760 eq. 1 (reinforcement). The KL is taken as known and entries have equal
        weights; the paper fits by the same least squares.
    """
    known = [i for i, value in enumerate(kl) if value > 0.0]
    if len(known) < 3 or not gains.size:
        return None
    # R is linear in alpha and beta, so one pseudoinverse solves all prompts.
    d = np.sqrt([kl[i] for i in known])
    design = np.stack([d, -d * np.log(d)], axis=1)  # (K, 2)
    per_prompt = np.linalg.pinv(design) @ gains[known]  # (2, P)
    alpha, beta = over_prompts(per_prompt[0]), over_prompts(per_prompt[1])
    # dR/dd = alpha - beta (log d + 1) = 0. A maximum at an unreachable KL counts as none.
    log_d = alpha.value / beta.value - 1.0 if beta.value > 0.0 else math.inf
    return CurveFit(alpha, beta, math.exp(2.0 * log_d) if log_d < 10.0 else None)


def gains_of(history: Sequence[Evaluation], name: str) -> NDArray[np.float64]:
    """Return the gain of ``proxy`` or ``gold`` over the first evaluation, shape (K, P)."""
    (table,) = by_prompt(history, name)
    return table - table[:1]


def best_step(history: Sequence[Evaluation]) -> int:
    """Return the step with the highest mean gold score, the earliest of equals.

    Each evaluation is compared with the best one before it, on the prompts that are valid in both:
    an evaluation whose difficult prompts have no score is not better for it.
    """
    best = history[0]
    for seen in history[1:]:
        pairs = zip(seen.gold, best.gold, strict=True)
        both = [(now, before) for now, before in pairs if now is not None and before is not None]
        if both:
            now, before = (sum(side) / len(both) for side in zip(*both, strict=True))
            best = seen if now > before else best
        elif all(score is None for score in best.gold):
            best = seen
    return best.step


def alarms(history: Sequence[Evaluation], *, window: int) -> list[Alarm]:
    """Return the alarms that the newest evaluation raises.

    Args:
        history: all evaluations so far, the first before the first step.
        window: number of newest evaluations in a slope; with fewer evaluations there is no alarm.
    """
    if len(history) < window:
        return []
    checks: Sequence[Callable[[Sequence[Evaluation], int], Alarm | None]] = (
        _gold_slope,
        _proxy_gap,
        _length,
        _repetition,
        _one_reward,
        _disagreement,
    )
    return [alarm for check in checks if (alarm := check(history, window)) is not None]


def stopping_alarm(
    history: Sequence[Evaluation], *, stop_on: Sequence[str], window: int, patience: int
) -> Alarm | None:
    """Return the alarm of ``stop_on`` that the newest ``patience`` evaluations all raise."""
    if len(history) < patience:
        return None
    # Each entry repeats the check on the history as it was i evaluations ago.
    raised = [
        {alarm.name: alarm for alarm in alarms(history[: len(history) - i], window=window)}
        for i in range(patience)
    ]
    return next((raised[0][n] for n in stop_on if all(n in found for found in raised)), None)


def _gold_slope_of(history: Sequence[Evaluation], window: int) -> Interval | None:
    """Return gold's slope per step; not per sqrt(KL), because the KL need not grow."""
    seen = history[-window:]
    (gold,) = by_prompt(seen, "gold")
    return slope(gold, [e.step for e in seen]) if gold.shape[1] > 1 else None


def _gold_slope(history: Sequence[Evaluation], window: int) -> Alarm | None:
    found = _gold_slope_of(history, window)
    if found is None or not found.high < 0.0:
        return None
    since = history[-window].step
    return Alarm(
        "gold_slope",
        f"the gold score falls by {-100 * found.value:.3g} per 100 steps since step {since} "
        f"(95 % interval {100 * found.low:.3g} to {100 * found.high:.3g})",
        f"keep the checkpoint of step {best_step(history)}; raise kl.coef or improve the reward",
    )


def _proxy_gap(history: Sequence[Evaluation], window: int) -> Alarm | None:
    """Compare the slopes in units of each score's spread over prompts before the first step."""
    steps = [e.step for e in history[-window:]]
    tables = by_prompt([history[0], *history[-window:]], "proxy", "gold")
    if tables[0].shape[1] < 2:
        return None
    # The scores have different units; row 0 is the evaluation before the first step.
    proxy, gold = (table[1:] / (table[0].std() or 1.0) for table in tables)
    # Alarm only if the gap opens, the proxy rises and gold does not, each beyond its interval.
    gap = slope(proxy - gold, steps)
    if gap.low <= 0.0 or slope(proxy, steps).low <= 0.0 or slope(gold, steps).low > 0.0:
        return None
    return Alarm(
        "proxy_gap",
        f"since step {steps[0]} the training score rises away from the gold score, by "
        f"{100 * gap.value:.3g} standard deviations per 100 steps, and gold does not rise",
        "inspect responses with a high reward; train the reward model on responses of this policy",
    )


def _gold_rises(history: Sequence[Evaluation], window: int) -> bool:
    found = _gold_slope_of(history, window)
    return found is not None and found.low > 0.0


def _rise(history: Sequence[Evaluation], of: Callable[[Evaluation], list[float]]) -> Interval:
    return over_prompts(np.array(of(history[-1])) - np.array(of(history[0])))


def _length(history: Sequence[Evaluation], window: int) -> Alarm | None:
    before, now = (float(np.mean(e.length)) for e in (history[0], history[-1]))
    # Longer responses are fine as long as the gold score rises with them.
    grown = _rise(history, lambda e: e.length).low > 0.0 and now > LONGER * before
    if not grown or _gold_rises(history, window):
        return None
    return Alarm(
        "length",
        f"responses grew from {before:.4g} to {now:.4g} tokens and the gold score does not rise",
        "add a length reward, or train the reward on pairs of equal length",
    )


def _repetition(history: Sequence[Evaluation], window: int) -> Alarm | None:
    before, now = (float(np.mean(e.repetition)) for e in (history[0], history[-1]))
    if not (_rise(history, lambda e: e.repetition).low > 0.0 and now > before + REPEATED):
        return None
    return Alarm(
        "repetition",
        f"{100 * now:.3g} % of the trigrams of a response are repeats, {100 * before:.3g} % at "
        "the start",
        "add a repetition reward, raise kl.coef or lower the learning rate",
    )


def _one_reward(history: Sequence[Evaluation], window: int) -> Alarm | None:
    before, now = history[0].rewards, history[-1].rewards
    rises = {name: now[name] - before[name] for name in before}
    if len(rises) < 2:
        return None
    # Absolute changes: rewards that fall must not cancel those that rise.
    total = sum(abs(x) for x in rises.values())
    name = max(rises, key=lambda n: rises[n])
    others = [n for n in rises if n != name]
    if rises[name] <= DOMINANT * total or _gold_rises(history, window):
        return None
    return Alarm(
        "one_reward",
        f"'{name}' makes {100 * rises[name] / total:.3g} % of the training score's change",
        f"lower the weight of '{name}', or raise that of {', '.join(others)}",
    )


def _disagreement(history: Sequence[Evaluation], window: int) -> Alarm | None:
    before, now = history[0].disagreement, history[-1].disagreement
    if before is None or now is None or not now > DISAGREEING * before:
        return None
    return Alarm(
        "disagreement",
        f"the members of the ensemble differ by {now:.3g} (std), {before:.3g} at the start",
        "combine by mean_minus_std; train the members on responses of this policy",
    )
