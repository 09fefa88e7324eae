"""Early stopping: track the best evaluation and stop when ``patience`` runs out."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from align.core.errors import TrainingError
from align.recipe.schema import EarlyStoppingSpec

log = logging.getLogger(__name__)
LOWER_IS_BETTER = ("loss", "kl", "bad_reward", "ece", "calibration_error", "brier", "perplexity")
"""Name endings of the metrics that improve when they fall; all others improve when they rise."""


@dataclass(slots=True)
class EarlyStopping:
    """Evaluations so far; the best weights are on disk, named by step.

    Attributes:
        spec: the recipe's block.
        save: saves the current weights under a step.
        prune: deletes all saved weights except those of the given steps.
        keep_checkpoints: number of checkpoints that are kept.
        history: (step, numbers) of each evaluation.
        checkpointed: best step at each checkpoint that a resumed run may return to.
    """

    spec: EarlyStoppingSpec
    save: Callable[[int], None]
    prune: Callable[[set[int]], None]
    keep_checkpoints: int
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    checkpointed: list[int] = field(default_factory=list)

    def look(self, step: int, found: Mapping[str, float]) -> None:
        """Record the metrics of the evaluation after ``step`` steps.

        Raises:
            TrainingError: the metric of early stopping is not among them.
        """
        if self.spec.metric not in found:
            raise TrainingError(
                f"keep.early_stopping.metric: '{self.spec.metric}' was not measured. Use one of "
                + ", ".join(found)
            )
        self.history.append((step, dict(found)))
        # The checkpointed bests stay too: a run that resumes there may still return them.
        if self.best_step == step:
            # At once: the weights of an earlier step cannot be had later.
            self.save(step)
            self.prune({step, *self.checkpointed})
        if self.stopped:
            log.info(
                "%s has not improved for %d evaluations (best %.4g at step %d): stopping early",
                self.spec.metric,
                self.spec.patience,
                self._value(self._best),
                self.best_step,
            )

    @property
    def best_step(self) -> int:
        """Step of the best evaluation."""
        return self.history[self._best][0]

    @property
    def best(self) -> dict[str, float]:
        """Metrics of the best evaluation."""
        return self.history[self._best][1]

    @property
    def stopped(self) -> bool:
        """Whether ``patience`` evaluations in a row brought no improvement."""
        return bool(self.history) and len(self.history) - 1 - self._best >= self.spec.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        # One more than is kept: the old checkpoints count until the new one is complete.
        if self.history:
            kept = [*self.checkpointed, self.best_step][-self.keep_checkpoints - 1 :]
            self.checkpointed = kept
            self.prune(set(kept))
        history = [[step, found] for step, found in self.history]
        return {"history": history, "checkpointed": self.checkpointed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.history = [(step, found) for step, found in state["history"]]
        self.checkpointed = list(state["checkpointed"])

    def _value(self, i: int) -> float:
        return self.history[i][1][self.spec.metric]

    @property
    def _best(self) -> int:
        """Index of the last evaluation that improved on the best by more than ``min_delta``.

        Any number improves on NaN, which no comparison would ever call worse.
        """
        # Compared with the best so far, not with the previous one: slow drift must not count.
        sign = -1.0 if self.spec.metric.endswith(LOWER_IS_BETTER) else 1.0
        best = 0
        for i in range(1, len(self.history)):
            is_first = math.isnan(self._value(best)) and not math.isnan(self._value(i))
            if is_first or sign * (self._value(i) - self._value(best)) > self.spec.min_delta:
                best = i
        return best
