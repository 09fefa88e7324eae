"""The card of a reward model: accuracy, length bias and calibration on held-out responses.

Pure functions of scores. Every number is [value, low, high] with the 95 % percentile interval of a
bootstrap clustered by prompt: several pairs of one prompt are not independent evidence.
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
"""Number of equal-width bins of the confidence, which is in [0.5, 1]."""
EVEN_LENGTHS = 0.1
"""Lengths that differ by at most this fraction of the longer one count as equal."""


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """A held-out preference pair with its scores.

    Attributes:
        source: dataset of the pair.
        prompt: text of the prompt; the cluster of the intervals.
        chosen: raw score of the chosen response.
        rejected: raw score of the rejected response.
        chosen_tokens: length of the chosen response in tokens.
        rejected_tokens: length of the rejected response in tokens.
        refuses: which response is a refusal: neither, chosen, rejected or both.
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
        """Return which response is longer: chosen longer, chosen shorter or about equal."""
        gap = self.chosen_tokens - self.rejected_tokens
        if abs(gap) <= EVEN_LENGTHS * max(self.chosen_tokens, self.rejected_tokens):
            return "about equal"
        return "chosen longer" if gap > 0 else "chosen shorter"


@dataclass(frozen=True, slots=True)
class ScoredSet:
    """The scores of several responses to one prompt: ``chosen`` are good, ``rejected`` are bad."""

    source: str
    prompt: str
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


def pair_card(pairs: Sequence[ScoredPair], *, seed: int) -> dict[str, Any]:
    """Return the measurements of a reward model on held-out pairs.

    Returns:
        ``pair_accuracy`` (equal scores count half), also ``by_source``, ``by_length`` and
        ``by_refusal``; ``length_balanced_accuracy`` (mean of two accuracies: chosen response longer
        and chosen response shorter); ``length_correlation`` (Spearman's, of score and tokens over
        all responses) and ``length_correlation_in_pair`` (of their differences); ``ece``,
        ``log_loss`` in nats (ln 2 = 0.693 is chance) and the points of ``calibration``.

    Raises:
        ValueError: ``pairs`` is empty.
    """
    if not pairs:
        raise ValueError("no held-out pairs to measure the reward model on")
    wins = np.array([won(p.chosen, p.rejected) for p in pairs])
    prompts = [p.prompt for p in pairs]
    # Columns: both scores, then both lengths.
    table = np.array([[p.chosen, p.rejected, p.chosen_tokens, p.rejected_tokens] for p in pairs])
    buckets = np.array([p.length_bucket for p in pairs])
    found: dict[str, Any] = {"num_pairs": len(pairs), "num_prompts": len(set(prompts))}
    # Headline numbers: all statistics share the same resamples.
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
    # Breakdowns.
    for name, key in (
        ("by_source", lambda p: p.source),
        ("by_length", lambda p: p.length_bucket),
        ("by_refusal", lambda p: p.refuses),
    ):
        found[name] = _accuracy_by([key(p) for p in pairs], wins, prompts, seed=seed)
    found["calibration"] = calibration(table[:, 0] - table[:, 1], prompts, seed=seed)
    return found


def won(chosen: float, rejected: float) -> float:
    """Return 1 if the chosen response scores higher, 0.5 for equal scores, else 0."""
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _accuracy_by(
    names: Sequence[str], wins: Array, prompts: Sequence[str], *, seed: int
) -> dict[str, dict[str, Any]]:
    """Return the pair accuracy and number of pairs of each group, the largest group first."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name, []).append(i)
    found = {}
    for name, rows in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        draws = Resampler([prompts[int(i)] for i in rows], seed=seed)
        found[name] = {"accuracy": draws.share(wins[rows]), "num_pairs": len(rows)}
    return found


class Resampler:
    """A cluster bootstrap whose resamples are drawn once and shared by all statistics.

    Args:
        clusters: name of each row's cluster.
        seed: random seed; the same seed gives the same intervals.
    """

    def __init__(self, clusters: Sequence[str], *, seed: int) -> None:
        names: dict[str, int] = {}
        index = np.array([names.setdefault(name, len(names)) for name in clusters])  # (rows,)
        members = [np.flatnonzero(index == k) for k in range(len(names))]
        rng = np.random.default_rng(seed)
        self._clusters = list(clusters)
        self._draws: list[Rows] = []
        # A single cluster has no spread between clusters: no resamples, no interval.
        for _ in range(NUM_DRAWS if len(members) > 1 else 0):
            # Whole clusters are drawn, then their rows.
            drawn = rng.integers(len(members), size=len(members))  # (clusters,)
            alone = len(members) == len(index)
            self._draws.append(drawn if alone else np.concatenate([members[k] for k in drawn]))

    def interval(self, statistic: Callable[[Rows], float]) -> Triple:
        """Return a statistic of the rows with its 95 % percentile interval.

        Args:
            statistic: function of row indices (repeated as often as drawn) that returns a number,
                or NaN if it is undefined for these rows.

        Returns:
            [value, low, high]; the bounds are None for a single cluster, if the statistic is
            undefined in more than 5 % of the resamples, or if they are equal: where no resample
            differs, the spread is unknown and not zero.
        """
        value = statistic(np.arange(len(self._clusters)))
        if not np.isfinite(value):
            return [None, None, None]
        found = np.array([statistic(rows) for rows in self._draws])
        known = found[np.isfinite(found)]
        if not len(known) or len(known) < 0.95 * len(found):
            return [value, None, None]
        low, high = np.quantile(known, (0.025, 0.975))
        return [value, float(low), float(high)] if low < high else [value, None, None]

    def share(self, values: Array) -> Triple:
        """Return the mean of values in [0, 1] with its interval."""
        # Equal values have no bootstrap spread, but are not certain either: use Wilson's interval.
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
    """Return the model's confidence in the side it prefers, and whether that side is chosen."""
    sure = 1.0 / (1.0 + np.exp(-np.abs(differences)))  # (pairs,), in [0.5, 1]
    right = np.where(differences == 0.0, 0.5, (differences > 0.0).astype(np.float64))
    return sure, right


def _bins(sure: Array) -> Rows:
    return np.minimum(((sure - 0.5) / 0.5 * NUM_BINS).astype(np.intp), NUM_BINS - 1)


def _ece(differences: Array) -> float:
    """Return the expected calibration error: the mean over pairs of |confidence - accuracy| by bin.

    Reference:
        arXiv:1706.04599 eq. 3, with the two classes "chosen wins" and "rejected wins".
    """
    sure, right = _confidence(differences)
    place = _bins(sure)
    gaps = np.bincount(place, weights=sure - right, minlength=NUM_BINS)  # (bins,), summed
    return float(np.abs(gaps).sum() / len(differences))


def calibration(differences: Array, prompts: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """Return the points of the reliability curve of sigmoid(score difference).

    Returns:
        For each non-empty bin its mean ``confidence``, its ``accuracy`` [value, low, high] and
        ``num_pairs``.
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
    """Return how often a good response has the highest score of its set: best-of-4 accuracy.

    With one good and three bad responses, chance is 0.25. If several responses share the highest
    score, the set counts by the fraction of good ones among them.

    Deviation from the reference: RewardBench 2 scores its domain Ties, in which several responses
    are good, by a formula of its own; here it is scored like the other domains.

    Raises:
        ValueError: ``sets`` is empty.

    Reference:
        arXiv:2506.01937 (RewardBench 2).
    """
    if not sets:
        raise ValueError("no sets of responses to measure the reward model on")
    credits = np.array([_top_share(s) for s in sets])
    prompts = [s.prompt for s in sets]
    overall = Resampler(prompts, seed=seed).share(credits)
    chance = float(np.mean([len(s.chosen) / (len(s.chosen) + len(s.rejected)) for s in sets]))
    by_source = _accuracy_by([s.source for s in sets], credits, prompts, seed=seed)
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
    """Return the agreement of two reward models on the same pairs.

    Returns:
        ``same_side``: fraction of pairs on which both prefer the same response (a tie of either
        model counts half); ``correlation``: Spearman's, of the score differences;
        ``accuracy_difference``: pair accuracy of the first model minus that of the second.
    """
    a, b = (np.array([p.chosen - p.rejected for p in side]) for side in (pairs, others))
    # Each is per pair, so that one set of resamples serves all three statistics.
    same = 0.5 + 0.5 * np.sign(a) * np.sign(b)  # (pairs,)
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
    """Return the gold score of the response that a reward model picks among n, for n = 1, 2, 4 ...

    Each prompt contributes the mean over all subsets of n of its N responses, which is unbiased and
    needs no sampling: sorted by the proxy, response i (from 0) is the best of C(i, n - 1) of the
    C(N, n) subsets. Responses with equal proxy scores share their gold scores.

    Args:
        proxy: prompt to the reward model's score of each of its responses.
        gold: prompt to the gold score of the same responses.
        seed: random seed of the bootstrap over prompts.

    Returns:
        For each n: ``n``, ``kl`` (the upper bound log n - (n - 1) / n in nats), ``gold`` [value,
        low, high], and ``best_possible`` (gold score if the gold score itself selects).

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
    """Return the mean gold score of the best by proxy over all subsets of n responses."""
    order = np.argsort(proxy, kind="stable")
    sorted_proxy = np.asarray(proxy, dtype=np.float64)[order]
    sorted_gold = np.asarray(gold, dtype=np.float64)[order]
    # Response i is the best of the subsets whose other n - 1 members are among the i below it.
    weights = np.array([comb(i, n - 1) for i in range(len(proxy))]) / comb(len(proxy), n)
    # Equal proxy scores are picked with equal probability: each gets their mean weight.
    _, tied = np.unique(sorted_proxy, return_inverse=True)
    shared = np.bincount(tied, weights=weights) / np.bincount(tied)
    return float(shared[tied] @ sorted_gold)
