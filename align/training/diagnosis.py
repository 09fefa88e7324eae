"""Diagnosis of a run that does not learn: apply the rules after each step, and report or stop."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.core.errors import TrainingError
from align.core.log import MetricsLog
from align.core.types import Alarm
from align.recipe.schema import TrainingStage
from align.training.causes import OFFLINE, ONLINE, taught_nothing
from align.training.evidence import Evidence, row_facts


class Diagnosis:
    """Applies the rules to a run's metrics; the same on every rank."""

    def __init__(
        self,
        spec: TrainingStage,
        *,
        total_steps: int,
        num_trained: int,
        rows: Sequence[Any] = (),
    ) -> None:
        """Begin without any step.

        Args:
            spec: the stage; its ``not_learning`` decides what an alarm does.
            total_steps: steps of the whole stage. num_trained: number of trained weights.
            rows: training rows of an offline stage.
        """
        self.mode = spec.not_learning
        facts = row_facts(rows if self.mode != "ignore" else ())
        self.evidence = Evidence(spec, total_steps, num_trained, facts)

    def look(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Add the metrics of a step and return the alarms that hold now."""
        if self.mode == "ignore":
            return []
        self.evidence.add(step, metrics)
        return self._alarms()

    def _alarms(self) -> list[Alarm]:
        found: dict[str, Alarm] = {}
        # Of each chain only the first cause is named; those behind it would be its consequences.
        for chain in ONLINE if self.evidence.is_online else OFFLINE:
            alarms = (rule(self.evidence) for rule in chain)
            first = next((alarm for alarm in alarms if alarm is not None), None)
            found |= {} if first is None else {first.name: first}
        return list(found.values())

    def report(self, step: int, metrics: Mapping[str, float], log: MetricsLog) -> None:
        """Add the metrics of a step, write new alarms, and end the stage if the recipe says so.

        Raises:
            TrainingError: there is an alarm and the recipe has ``not_learning: stop``.
        """
        self._raise(step, self.look(step, metrics), log)

    def finish(self) -> None:
        """End the stage if all its steps could not teach the model anything, and a cause is known.

        Raises:
            TrainingError: that is so, and the recipe does not have ``not_learning: ignore``.
        """
        if self.mode == "ignore" or not self.evidence.step or not taught_nothing(self.evidence):
            return
        if found := self._alarms():
            raise TrainingError(
                f"the model has learned nothing in {self.evidence.step} steps ({_told(found)}); "
                f"{found[0].remedy}. To save it anyway, write not_learning: ignore"
            )

    def conclude(self, step: int, alarm: Alarm | None, log: MetricsLog) -> None:
        """Write an alarm about the trained model, and end the stage if the recipe says so.

        Raises:
            TrainingError: there is an alarm and the recipe has ``not_learning: stop``.
        """
        self._raise(step, [] if alarm is None or self.mode == "ignore" else [alarm], log)

    def _raise(self, step: int, found: Sequence[Alarm], log: MetricsLog) -> None:
        for alarm in found:
            log.alarm(step, alarm)
        if found and self.mode == "stop":
            raise TrainingError(
                f"step {step}: the run does not learn ({_told(found)}). {found[0].remedy}. To "
                "train on, write not_learning: warn"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return self.evidence.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.evidence.load_state_dict(state)


def _told(found: Sequence[Alarm]) -> str:
    return "; ".join(f"{alarm.name}: {alarm.reason}" for alarm in found)
