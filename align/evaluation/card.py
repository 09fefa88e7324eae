"""The card of a reward model: how well, how evenly and how honestly it ranks held-out answers.

Pure functions of scores. Every number is [value, low, high] with the 95 % percentile interval of a
bootstrap over prompts, so that several pairs of one prompt are not taken for independent evidence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.evaluation.compare import Triple, as_triple
from align.evaluation.stats import win_rate

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
NUM_DRAWS = 1000
NUM_BINS = 5
"""Bins of the confidence, which lies in [0.5, 1]."""
EVEN_LENGTHS = 0.1
"""Answers whose lengths differ by at most this share of the longer one count as equally long."""


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """Hold one held-out pair as a reward model sees it.

    Attributes:
        source: where the pair comes from. prompt: what its prompt is, for the intervals.
        chosen: raw score of the preferred answer. rejected: that of the other one.
        chosen_tokens, rejected_tokens: length of each answer.
        refuses: which side declines to answer: neither, chosen, rejected or both.
    """

    source: str
    prompt: str
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    refuses: str = "neither"

    @property
    def length_bucket(self) -> str:
        """Say which answer is longer."""
        gap = self.chosen_tokens - self.rejected_tokens
        if abs(gap) <= EVEN_LENGTHS * max(self.chosen_tokens, self.rejected_tokens):
            return "about equal"
        return "chosen longer" if gap > 0 else "chosen shorter"


@dataclass(frozen=True, slots=True)
class ScoredSet:
    """Hold the scores of several answers to one prompt, good ones and bad ones."""

    source: str
    prompt: str
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


def pair_card(pairs: Sequence[ScoredPair], *, seed: int) -> dict[str, Any]:
    """Measure a reward model on held-out pairs.

    Returns:
        ``pair_accuracy`` (equal scores count half), the same ``by_source``, ``by_length`` and
        ``by_refusal``; ``length_balanced_accuracy`` (mean of the accuracies where the chosen
        answer is longer and where it is shorter); ``length_correlation`` (Spearman's, of score and
        tokens over all answers) and ``length_correlation_in_pair`` (of their differences);
        ``ece``, ``log_loss`` in nats (ln 2 = 0.693 is chance) and the points of ``calibration``.

    Raises:
        ValueError: there is no pair.
    """
    if not pairs:
        raise ValueError("no held-out pairs to measure the reward model on")
    wins = np.array([won(p.chosen, p.rejected) for p in pairs])
    prompts = [p.prompt for p in pairs]
    table = np.array([[p.chosen, p.rejected, p.chosen_tokens, p.rejected_tokens] for p in pairs])
    buckets = np.array([p.length_bucket for p in pairs])
    found: dict[str, Any] = {"num_pairs": len(pairs), "num_prompts": len(set(prompts))}
    draws = Resampler(prompts, seed=seed)
    found["pair_accuracy"] = draws.share(wins)
    statistics: dict[str, Callable[[Rows], float]] = {
        "length_balanced_accuracy": lambda rows: _balanced(wins[rows], buckets[rows]),
        "length_correlation": lambda rows: _spearman(
            table[rows, :2].ravel(), table[rows, 2:].ravel()
        ),
        "length_correlation_in_pair": lambda rows: _spearman(
            table[rows, 0] - table[rows, 1], table[rows, 2] - table[rows, 3]
        ),
        "ece": lambda rows: _ece(table[rows, 0] - table[rows, 1]),
        "log_loss": lambda rows: float(np.logaddexp(0.0, table[rows, 1] - table[rows, 0]).mean()),
    }
    for name, statistic in statistics.items():
        found[name] = draws.interval(statistic)
    for name, key in (
        ("by_source", lambda p: p.source),
        ("by_length", lambda p: p.length_bucket),
        ("by_refusal", lambda p: p.refuses),
    ):
        found[name] = accuracy_by([key(p) for p in pairs], wins, prompts, seed=seed)
    found["calibration"] = calibration(table[:, 0] - table[:, 1], prompts, seed=seed)
    return found


def won(chosen: float, rejected: float) -> float:
    """Give 1 where the chosen answer scores higher, 0.5 for equal scores, else 0."""
    return 0.5 if chosen == rejected else float(chosen > rejected)


def accuracy_by(
    names: Sequence[str], wins: Array, prompts: Sequence[str], *, seed: int
) -> dict[str, dict[str, Any]]:
    """Give the pair accuracy and the number of pairs of each named group, most pairs first."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name, []).append(i)
    found = {}
    for name, rows in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        draws = Resampler([prompts[int(i)] for i in rows], seed=seed)
        found[name] = {"accuracy": draws.share(wins[rows]), "num_pairs": len(rows)}
    return found


class Resampler:
    """Draw clusters of rows with replacement, once, for any number of statistics.

    Args:
        clusters: name of each row's cluster. seed: the same seed gives the same intervals.
    """

    def __init__(self, clusters: Sequence[str], *, seed: int) -> None:
        names: dict[str, int] = {}
        index = np.array([names.setdefault(name, len(names)) for name in clusters])
        members = [np.flatnonzero(index == k) for k in range(len(names))]
        rng = np.random.default_rng(seed)
        self._clusters = list(clusters)
        self._draws: list[Rows] = []
        for _ in range(NUM_DRAWS if len(members) > 1 else 0):
            drawn = rng.integers(len(members), size=len(members))
            alone = len(members) == len(index)
            self._draws.append(drawn if alone else np.concatenate([members[k] for k in drawn]))

    def interval(self, statistic: Callable[[Rows], float]) -> Triple:
        """Give a statistic of rows with its percentile interval.

        Args:
            statistic: takes row numbers (repeated ones as often as drawn) and gives a number, NaN
                where it is not defined.

        Returns:
            [value, low, high]; the bounds are None for a single cluster, and where the statistic
            is undefined in more than 5 % of the draws.
        """
        value = statistic(np.arange(len(self._clusters)))
        if not np.isfinite(value):
            return [None, None, None]
        found = np.array([statistic(rows) for rows in self._draws])
        known = found[np.isfinite(found)]
        if not len(known) or len(known) < 0.95 * len(found):
            return [value, None, None]
        low, high = np.quantile(known, (0.025, 0.975))
        return [value, float(low), float(high)]

    def share(self, values: Array) -> Triple:
        """Give the mean of values in [0, 1]; where all are alike the bounds are Wilson's."""
        if len(self._draws) and np.ptp(values) == 0.0:
            return as_triple(win_rate(values, 1.0 - values, clusters=self._clusters))
        return self.interval(lambda rows: float(values[rows].mean()))


def _balanced(wins: Array, buckets: NDArray[Any]) -> float:
    sides = [wins[buckets == name] for name in ("chosen longer", "chosen shorter")]
    return float(np.mean([side.mean() for side in sides])) if all(map(len, sides)) else np.nan


def _spearman(a: Array, b: Array) -> float:
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(a), rankdata(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norm = float(np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1])))
    return float(ranks[0] @ ranks[1]) / norm if norm > 0.0 else np.nan


def _confidence(differences: Array) -> tuple[Array, Array]:
    """Give how sure the model is of the side it prefers, and whether that side is the chosen."""
    sure = 1.0 / (1.0 + np.exp(-np.abs(differences)))
    right = np.where(differences == 0.0, 0.5, (differences > 0.0).astype(np.float64))
    return sure, right


def _bins(sure: Array) -> Rows:
    return np.minimum(((sure - 0.5) / 0.5 * NUM_BINS).astype(np.intp), NUM_BINS - 1)


def _ece(differences: Array) -> float:
    """Give the expected calibration error: the mean over pairs of |confidence - accuracy| by bin.

    Reference: arXiv:1706.04599 eq. 3, with the two classes "chosen wins" and "rejected wins".
    """
    sure, right = _confidence(differences)
    place = _bins(sure)
    gaps = np.bincount(place, weights=sure - right, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(differences))


def calibration(differences: Array, prompts: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """Give the points of the reliability curve of sigmoid(score difference), empty bins left out.

    Returns:
        For each bin ``confidence`` (its mean), ``accuracy`` [value, low, high] and ``num_pairs``.
    """
    sure, right = _confidence(differences)
    place = _bins(sure)
    points = []
    for number in range(NUM_BINS):
        rows = np.flatnonzero(place == number)
        if not len(rows):
            continue
        draws = Resampler([prompts[int(i)] for i in rows], seed=seed)
        points.append(
            {
                "confidence": float(sure[rows].mean()),
                "accuracy": draws.share(right[rows]),
                "num_pairs": len(rows),
            }
        )
    return points


def set_card(sets: Sequence[ScoredSet], *, seed: int) -> dict[str, Any]:
    """Give how often the highest score of a set is that of a good answer: best-of-4 accuracy.

    With one good and three bad answers chance is 0.25. Where several answers share the highest
    score the set counts by the share of good ones among them.

    Reference: the accuracy of RewardBench 2 (arXiv:2506.01937); its domain Ties, in which several
        answers are good, is scored there by a sum of its own and here like the others.

    Raises:
        ValueError: there is no set.
    """
    if not sets:
        raise ValueError("no sets of answers to measure the reward model on")
    credits = np.array([_top_share(s) for s in sets])
    prompts = [s.prompt for s in sets]
    overall = Resampler(prompts, seed=seed).share(credits)
    chance = float(np.mean([len(s.chosen) / (len(s.chosen) + len(s.rejected)) for s in sets]))
    by_source = accuracy_by([s.source for s in sets], credits, prompts, seed=seed)
    return {
        "best_of_set_accuracy": overall,
        "num_sets": len(sets),
        "chance": chance,
        "sets_by_source": by_source,
    }


def _top_share(answers: ScoredSet) -> float:
    top = max((*answers.chosen, *answers.rejected))
    good, bad = answers.chosen.count(top), answers.rejected.count(top)
    return good / (good + bad)


def agreement(
    pairs: Sequence[ScoredPair], others: Sequence[ScoredPair], *, seed: int
) -> dict[str, Triple]:
    """Compare two models on the same pairs.

    Returns:
        ``same_side``: share of pairs of which both prefer the same answer (a tie of either counts
        half); ``correlation``: Spearman's, of the score differences; ``accuracy_difference``: pair
        accuracy of the first minus that of the second.
    """
    a, b = (np.array([p.chosen - p.rejected for p in side]) for side in (pairs, others))
    same = 0.5 + 0.5 * np.sign(a) * np.sign(b)
    ahead = 0.5 * (np.sign(a) - np.sign(b))
    draws = Resampler([p.prompt for p in pairs], seed=seed)
    return {
        "same_side": draws.share(same),
        "correlation": draws.interval(lambda rows: _spearman(a[rows], b[rows])),
        "accuracy_difference": draws.interval(lambda rows: float(ahead[rows].mean())),
    }


def best_of_n(
    proxy: Mapping[str, Sequence[float]], gold: Mapping[str, Sequence[float]], *, seed: int
) -> list[dict[str, Any]]:
    """Give the gold score of the answer that the reward model picks among n, for n = 1, 2, 4 ...

    For each prompt the mean over all subsets of n of its N answers is taken, which is unbiased and
    needs no drawing: with the answers in order of the proxy, answer i is the best of a subset in
    C(i, n - 1) of C(N, n) cases (i from 0); equal proxies share their gold.

    Args:
        proxy: prompt -> the reward model's score of each of its answers.
        gold: prompt -> the score that counts, of the same answers.
        seed: of the bootstrap over prompts.

    Returns:
        For each n ``n``, ``kl`` (the upper bound log n - (n - 1) / n in nats), ``gold`` [value,
        low, high] and ``best_possible``, the gold of the best by gold itself.

    Reference:
        arXiv:2112.09332 (estimator), arXiv:2210.10760 section 2 (KL).
    """
    size = min((len(scores) for scores in proxy.values()), default=0)
    points: list[dict[str, Any]] = []
    draws = Resampler(list(proxy), seed=seed)
    n = 1
    while n <= size:
        picked = np.array([_expected_best(proxy[p], gold[p], n) for p in proxy])
        ideal = np.array([_expected_best(gold[p], gold[p], n) for p in proxy])
        points.append(
            {
                "n": n,
                "kl": float(np.log(n) - (n - 1) / n),
                "gold": draws.interval(lambda rows, picked=picked: float(picked[rows].mean())),
                "best_possible": float(ideal.mean()),
            }
        )
        n *= 2
    return points


def _expected_best(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Average the gold of the best by proxy over all subsets of n answers."""
    order = np.argsort(proxy, kind="stable")
    sorted_proxy = np.asarray(proxy, dtype=np.float64)[order]
    sorted_gold = np.asarray(gold, dtype=np.float64)[order]
    weights = np.array([comb(i, n - 1) for i in range(len(proxy))]) / comb(len(proxy), n)
    # Among equal proxies the pick is by chance: each gets the mean weight of them all.
    _, tied = np.unique(sorted_proxy, return_inverse=True)
    shared = np.bincount(tied, weights=weights) / np.bincount(tied)
    return float(shared[tied] @ sorted_gold)
