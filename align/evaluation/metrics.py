"""Metrics as ``evaluate.Metric`` subclasses that need no hub, no network and no cache folder.

Each metric returns its value with a 95 % interval. Scores of None are counted as invalid and
excluded from the mean.
"""

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value

from align.evaluation.compare import as_triple, mean_interval, valid_pairs
from align.evaluation.stats import win_rate
from reward_models import build_reward

Scores = Sequence[float | None]


class _MemoryMetric(evaluate.Metric):
    """A metric that keeps its inputs in memory; the base class creates a cache folder otherwise."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _build_data_dir(self) -> str:
        """Return the data folder without creating it; an in-memory metric never writes to it."""
        return self._data_dir_root


def _info(description: str, inputs: str, features: Features) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description=inputs, features=features
    )


def _interval(name: str, triple: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip((name, "low", "high"), triple, strict=True))


def _two_scores() -> Features:
    return Features({"predictions": Value("float64"), "references": Value("float64")})


class MeanScore(_MemoryMetric):
    """The mean of scores: ``{"mean", "low", "high", "invalid"}``."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Mean of one score per response.",
            "predictions: scores, None if invalid; clusters: the prompt of each.",
            Features({"predictions": Value("float64")}),
        )

    def _compute(
        self, predictions: Scores, clusters: Sequence[Any] | None = None
    ) -> dict[str, float | int | None]:
        names = range(len(predictions)) if clusters is None else clusters
        triple = as_triple(mean_interval(predictions, names))
        invalid = sum(score is None for score in predictions)
        return {**_interval("mean", triple), "invalid": invalid}


class ExactMatch(_MemoryMetric):
    """The fraction of responses equal to the reference, by the rule-based reward ``exact_match``.

    Returns ``{"exact_match", "low", "high", "invalid"}``.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Fraction of responses equal to their reference.",
            "predictions, references: strings; pattern: regex whose one group is the part of the "
            "response that is compared; ignore_case; clusters: the prompt of each.",
            Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        pattern: str | None = None,
        ignore_case: bool = True,
        clusters: Sequence[Any] | None = None,
    ) -> dict[str, float | int | None]:
        rule = build_reward({"kind": "exact_match", "pattern": pattern, "ignore_case": ignore_case})
        scores = rule(prompts=predictions, completions=predictions, answer=references)
        names = range(len(scores)) if clusters is None else clusters
        triple = as_triple(mean_interval(scores, names))
        return {**_interval("exact_match", triple), "invalid": sum(s is None for s in scores)}


def _wins(
    name: str, a: Scores, b: Scores, *, clusters: Sequence[Any] | None
) -> dict[str, float | int | None]:
    kept_a, kept_b, names = valid_pairs(a, b, range(len(a)) if clusters is None else clusters)
    won = win_rate(kept_a, kept_b, clusters=names) if kept_a else None
    counts = (won.wins, won.ties, won.losses) if won else (0, 0, 0)
    return {
        **_interval(name, as_triple(won)),
        **dict(zip(("wins", "ties", "losses"), counts, strict=True)),
        "invalid": len(a) - len(kept_a),
    }


class WinRate(_MemoryMetric):
    """How often the judge scores one model above the other, ties half.

    Returns ``{"win_rate", "low", "high", "wins", "ties", "losses", "invalid"}``.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Fraction of prompts on which the first model's response is judged better, ties half.",
            "predictions, references: the judge's scores of the model and of the baseline.",
            _two_scores(),
        )

    def _compute(
        self, predictions: Scores, references: Scores, clusters: Sequence[Any] | None = None
    ) -> dict[str, float | int | None]:
        return _wins("win_rate", predictions, references, clusters=clusters)


class PairAccuracy(_MemoryMetric):
    """How often a reward model scores the chosen response above the rejected one, ties half.

    Returns ``{"pair_accuracy", "low", "high", "wins", "ties", "losses", "invalid"}``.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Fraction of preference pairs that a reward model ranks as the data do, ties half.",
            "predictions, references: scores of the chosen and of the rejected responses.",
            _two_scores(),
        )

    def _compute(
        self, predictions: Scores, references: Scores, clusters: Sequence[Any] | None = None
    ) -> dict[str, float | int | None]:
        return _wins("pair_accuracy", predictions, references, clusters=clusters)
