"""Early stopping: which evaluation was the best, and whether the stage has waited long enough."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from align.core.errors import TrainingError
from align.recipe.schema import EarlyStoppingSpec

log = logging.getLogger(__name__)
LOWER_IS_BETTER = ("loss", "kl", "bad_reward", "ece", "calibration_error", "brier", "perplexity")
"""How the names of held-out numbers end that get better by falling; all others rise."""


@dataclass(slots=True)
class EarlyStopping:
    """Hold the evaluations so far; the best weights lie on disk by step.

    Attributes:
        spec: the recipe's block.
        save: keeps the present weights as those of a step.
        prune: forgets all kept weights but those of the given steps.
        history: (step, numbers) of each evaluation.
        checkpointed: best step at the newest checkpoint: a resumed run may come back to it.
    """

    spec: EarlyStoppingSpec
    save: Callable[[int], None]
    prune: Callable[[set[int]], None]
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    checkpointed: int | None = None

    def look(self, step: int, found: Mapping[str, float]) -> None:
        """Take in the numbers that were measured after ``step`` steps.

        Raises:
            TrainingError: the watched number is not among them.
        """
        if self.spec.metric not in found:
            raise TrainingError(
                f"keep.early_stopping.metric: '{self.spec.metric}' was not measured, only "
                + ", ".join(found)
            )
        self.history.append((step, dict(found)))
        if self.best_step == step:
            self.save(step)
            self.prune({step} | ({self.checkpointed} if self.checkpointed is not None else set()))
        if self.stopped:
            log.info(
                "%s has not got better for %d evaluations (best %.4g at step %d): the stage ends",
                self.spec.metric,
                self.spec.patience,
                self._value(self._best),
                self.best_step,
            )

    @property
    def best_step(self) -> int:
        """Give the step of the best evaluation."""
        return self.history[self._best][0]

    @property
    def best(self) -> dict[str, float]:
        """Give the numbers of the best evaluation."""
        return self.history[self._best][1]

    @property
    def stopped(self) -> bool:
        """Say whether ``patience`` evaluations in a row brought no gain."""
        return bool(self.history) and len(self.history) - 1 - self._best >= self.spec.patience

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint holds, as JSON values."""
        if self.history:
            self.checkpointed = self.best_step
            self.prune({self.checkpointed})
        return {"history": [[step, found] for step, found in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history = [(step, found) for step, found in state["history"]]
        self.checkpointed = self.best_step if self.history else None

    def _value(self, i: int) -> float:
        return self.history[i][1][self.spec.metric]

    @property
    def _best(self) -> int:
        """Give the number of the last evaluation that gained more than ``min_delta``."""
        sign = -1.0 if self.spec.metric.endswith(LOWER_IS_BETTER) else 1.0
        best = 0
        for i in range(1, len(self.history)):
            if sign * (self._value(i) - self._value(best)) > self.spec.min_delta:
                best = i
        return best
