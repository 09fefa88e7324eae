"""What a run has shown so far: the input of the rules in ``align.training.causes``."""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import mul
from typing import Any

import numpy as np

from align.core.types import PairRow, TokenRow
from align.data.store.rows import StoredRows
from align.recipe.schema import OnlineStage, TrainingStage

WINDOW, SHORTEST = 5, 3
"""Number of newest steps that a rule reads, and how few of a shorter run are enough."""
LARGEST = ("grad_norm", "learning_rate", "update_ratio", "update_per_rate")
"""Quantities of the optimizer whose largest value so far is kept."""


@dataclass(frozen=True, slots=True)
class RowFacts:
    """Facts about the training rows of an offline stage, over all rows.

    Attributes:
        num: rows. equal: whether all rows are the same.
        untrained: rows of sft without a token that enters the loss.
        labels: different labels, at most two; empty for rows without a label.
    """

    num: int = 0
    equal: bool = False
    untrained: int = 0
    labels: tuple[Hashable, ...] = ()


def row_facts(rows: Sequence[Any]) -> RowFacts:
    """Return the facts about rows of any offline stage."""
    if not rows:
        return RowFacts()
    if isinstance(rows, StoredRows) and rows.is_plain:
        return _stored_facts(rows)
    first, labels = _tokens(rows[0]), set[Hashable]()
    for row in rows:
        # Two different labels already answer the question; a large file is not read on for it.
        labels |= _labels(row)
        if len(labels) > 1:
            break
    # Rows of other kinds, such as kto's, are trained by their label and not by a mask alone.
    plain = [row for row in rows if type(row) is TokenRow]
    return RowFacts(
        num=len(rows),
        equal=all(_tokens(row) == first for row in rows),
        untrained=sum(not _is_trained(row) for row in plain),
        labels=tuple(sorted(labels, key=str)),
    )


def _stored_facts(rows: StoredRows) -> RowFacts:
    """Return the facts about plain rows of stores from their columns; such rows have no label."""
    first = rows[0].input_ids
    untrained, equal = 0, True
    for _, ids, mask, lengths in rows.chunks():
        starts = np.cumsum(lengths) - lengths
        untrained += int((np.add.reduceat(mask, starts, dtype=np.int64) == 0).sum())
        equal = equal and bool((lengths == len(first)).all())
        equal = equal and bool((ids.reshape(-1, len(first)) == np.array(first)).all())
    return RowFacts(num=len(rows), equal=equal, untrained=untrained)


def _tokens(row: Any) -> Sequence[Sequence[int]]:
    if isinstance(getattr(row, "pair", None), PairRow):
        return (row.pair.chosen.input_ids, row.pair.rejected.input_ids)
    return (row.input_ids,)


def _labels(row: object) -> set[Hashable]:
    for name in ("good", "label"):
        if hasattr(row, name):
            return {getattr(row, name)}
    return set(getattr(row, "labels", ()))


def _is_trained(row: TokenRow) -> bool:
    if row.weights:
        return row.label_prob > 0.0 and any(map(mul, row.weights, row.trained))
    return row.label_prob > 0.0 and True in row.trained


@dataclass(slots=True)
class Evidence:
    """The newest steps of a run and what all its steps have shown.

    Attributes:
        spec: the stage. total_steps: how many steps it will take.
        num_trained: number of trained weights. rows: facts about the training rows, if any.
        step: steps done. window: metrics of the newest steps.
        first: metrics of the first step. largest: largest value so far of those of the optimizer,
            of the fraction of groups with unequal rewards, and of the rewards' relative spread.
        rates: sum of the learning rates so far.
    """

    spec: TrainingStage
    total_steps: int
    num_trained: int
    rows: RowFacts = field(default_factory=RowFacts)
    step: int = 0
    window: deque[Mapping[str, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    first: Mapping[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    rates: float = 0.0

    @property
    def is_online(self) -> bool:
        """Whether the stage samples its own responses."""
        return isinstance(self.spec, OnlineStage)

    @property
    def last(self) -> bool:
        """Whether the newest step is the last one."""
        return self.step >= self.total_steps

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step."""
        self.step = step
        self.first = self.first or dict(metrics)
        self.window.append(dict(metrics))
        self.rates += metrics.get(self.optim("learning_rate"), 0.0)
        found = {name: metrics.get(self.optim(name), 0.0) for name in LARGEST}
        found["live"] = 1.0 - metrics.get("reward/dead_group_frac", 0.0)
        size = max(1e-30, abs(metrics.get("reward/mean", 0.0)))
        found["spread"] = metrics.get("reward/std", 0.0) / size
        for name, value in found.items():
            self.largest[name] = max(self.largest.get(name, 0.0), value)

    def optim(self, name: str) -> str:
        """Return the full name of a metric of the policy's optimizer."""
        return f"{'policy' if self.is_online else 'optim'}/{name}"

    def values(self, name: str) -> list[float]:
        """Return a metric in the newest steps; empty if there are too few, or one lacks it."""
        needed = max(SHORTEST, min(WINDOW, self.total_steps))
        if len(self.window) < needed or not all(name in row for row in self.window):
            return []
        return [row[name] for row in self.window]

    def mean(self, name: str) -> float:
        """Return the mean of a metric in the newest steps that have it; 0 if none has."""
        known = [row[name] for row in self.window if name in row]
        return sum(known) / len(known) if known else 0.0

    def always(self, name: str, low: float, high: float = float("inf")) -> bool:
        """Return whether a metric was in [low, high] in each of the newest steps."""
        found = self.values(name)
        return bool(found) and all(low <= value <= high for value in found)

    @property
    def reward_gain(self) -> float:
        """Mean reward of the newest steps minus that of the first step."""
        return self.mean("reward/mean") - self.first.get("reward/mean", 0.0)

    @property
    def reward_rose(self) -> bool:
        """Whether the mean reward rose by half of the first step's standard deviation."""
        return self.reward_gain > 0.5 * self.first.get("reward/std", 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values."""
        kept = {name: getattr(self, name) for name in ("step", "first", "largest", "rates")}
        return kept | {"window": list(self.window)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.step, self.first, self.rates = state["step"], state["first"], state["rates"]
        self.largest = dict(state["largest"])
        self.window.extend(state["window"])
