"""Held-out evaluation of the offline methods, and its change since before the first step.

The rows are split once into groups that share no prompt. The same groups are measured at each
evaluation, so the difference to the first one is paired by group, and its interval is that of a sum
over random groups. A group costs about as much as a micro-batch, a row alone would cost more.
"""

import logging
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import scipy
import torch
from torch import nn

from align.core import distributed
from align.core.metrics import described
from align.core.types import PairRow, TokenRow
from align.training.task import OfflineTask, counts_of, micro_batches

log = logging.getLogger(__name__)
NUM_GROUPS = 32
MIN_GROUPS = 8
"""Fewer groups have no interval: their spread is itself too uncertain."""


class HeldOut:
    """The held-out rows of a task in groups, and their statistics before the first step.

    Attributes:
        first: statistic -> one value per group, before the first step; None until measured.
    """

    def __init__(self, task: OfflineTask[Any], micro_tokens: int) -> None:
        self._task, self._micro_tokens = task, micro_tokens
        prompts = [prompt_of(row) for row in task.heldout]
        self._groups = random_groups(prompts)
        self.first: dict[str, list[float]] | None = None
        if (num := len(set(prompts))) < len(prompts):
            log.warning(
                "heldout: %d rows have %d different prompts. Rows with the same prompt count as "
                "one piece of evidence in the intervals",
                len(prompts),
                num,
            )

    def start(self, model: nn.Module) -> dict[str, float]:
        """Return the statistics before the first step, which later ones are compared with."""
        self.first = self._by_group(model)
        return {f"eval/{name}": sum(values) for name, values in self.first.items()}

    def look(self, model: nn.Module) -> dict[str, float]:
        """Return the statistics now, and their changes since ``start`` with 95 % bounds."""
        now = self._by_group(model)
        found = {f"eval/{name}": sum(values) for name, values in now.items()}
        if self.first is None:
            return found
        for name, values in now.items():
            if name in self.first:
                found |= change(name, self.first[name], values)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return {"first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.first = state["first"]

    @torch.no_grad()
    def _by_group(self, model: nn.Module) -> dict[str, list[float]]:
        """Return each statistic's parts by group; their sum is the statistic of all rows."""
        model.eval()
        task, rows = self._task, self._task.heldout
        # What a task measures on the whole batch, such as KTO's reference point.
        extra = {} if task.measure is None else task.measure(model, rows)
        # The counts are those of all rows, so that the parts add up.
        counts = counts_of(task, rows)
        totals: dict[str, float] = {}
        for i, group in enumerate(self._groups):
            # Every rank has the same groups and runs its part of each.
            part = [rows[place] for place in group]
            for micro in micro_batches(task, part, self._micro_tokens, counts=counts):
                batch = replace(micro, counts={**micro.counts, **extra})
                loss, stats = task.loss_fn(model, batch)
                for name, value in {"loss": loss, **stats}.items():
                    key = f"{name}/{i}"
                    totals[key] = totals.get(key, 0.0) + float(value)
        sums = distributed.global_sums(totals)
        names = dict.fromkeys(key.rpartition("/")[0] for key in totals)
        return {name: [sums[f"{name}/{i}"] for i in range(len(self._groups))] for name in names}


def change(name: str, first: Sequence[float], now: Sequence[float]) -> dict[str, float]:
    """Return ``change/<name>``: the difference of two sums over groups, with 95 % bounds.

    The bounds are left out with fewer than ``MIN_GROUPS`` groups. Groups count alike; those of
    unequal size make the interval a little wider.

    Reference: Wolter, Introduction to Variance Estimation, section 2.2 (random groups): the
    variance of a sum over G groups is estimated by G / (G - 1) times the sum of the squared
    deviations from the groups' mean. The bounds of a fraction's change end where it would leave
    [0, 1].
    """
    parts = [b - a for a, b in zip(first, now, strict=True)]
    num, total = len(parts), math.fsum(parts)
    found = {f"change/{name}": total}
    if num < MIN_GROUPS:
        return found
    squares = math.fsum((part - total / num) ** 2 for part in parts)
    half = float(scipy.special.stdtrit(num - 1, 0.975)) * math.sqrt(num / (num - 1) * squares)
    low, high = total - half, total + half
    if (known := described(f"eval/{name}")) is not None and known.unit == "fraction":
        start = math.fsum(first)
        low, high = max(low, -start), min(high, 1.0 - start)
    return found | {f"change/{name}_low": low, f"change/{name}_high": high}


def random_groups(prompts: Sequence[Hashable]) -> list[list[int]]:
    """Return the places of the rows in at most ``NUM_GROUPS`` groups of about equal size.

    Rows with the same prompt are in one group. The groups do not depend on a seed of the run.
    """
    clusters: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        clusters.setdefault(prompt, []).append(i)
    shuffled = list(clusters.values())
    random.Random(0).shuffle(shuffled)
    # The largest clusters first, each to the smallest group.
    groups: list[list[int]] = [[] for _ in range(min(NUM_GROUPS, len(shuffled)))]
    for cluster in sorted(shuffled, key=len, reverse=True):
        min(groups, key=len).extend(cluster)
    return groups


def prompt_of(row: Any) -> tuple[int, ...]:
    """Return the tokens before a row's response; the whole row if it has no prompt."""
    pair = row if isinstance(row, TokenRow | PairRow) else row.pair
    if isinstance(pair, PairRow):
        return pair.chosen.input_ids[: pair.num_prompt_tokens]
    num = pair.trained.index(True) if any(pair.trained) else 0
    # A text without a prompt trains all tokens, or all but the first.
    return pair.input_ids[:num] if num > 1 else pair.input_ids
