"""A user-defined reward function, run in a separate process.

The suite knows nothing about this code: it may hang, raise, leak, print or exit. It runs in a
worker with a deadline and a memory limit, which is restarted after a failure. A missing score is
counted with its reason and never becomes a number.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from reward_models.base import MissingColumnError, Text, check_rows
from reward_models.specs import PythonSpec
from reward_models.worker import Worker, WorkerError

log = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0
"""Seconds for the module to import; torch takes several seconds on a busy machine."""
PATIENCE = 4
"""Number of deadlines that one call may spend on finding the responses that hang."""


class OwnReward:
    """Score responses with a function that follows TRL's, verl's or OpenRLHF's convention.

    A batch that fails is scored again in parts, so that a bad response affects only itself.

    Attributes:
        style: the convention of the function.
    """

    def __init__(self, spec: PythonSpec) -> None:
        self.name = self.__name__ = spec.label
        self.weight = spec.weight
        self.deadline_s = spec.deadline_s
        self.invalid: Counter[str] = Counter()
        self._told: set[str] = set()
        self._has_answered = False
        told = spec.model_dump_json(include={"path", "args", "memory_gib"})
        self.worker = Worker(
            "reward_models.own_process", [told], start_timeout_s=START_TIMEOUT_S, name="function"
        )
        try:
            self.style: str = self._start()["style"]
        except WorkerError as error:
            raise ValueError(f"reward '{self.name}': {spec.path}: {error}") from None

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Score each response.

        Raises:
            MissingColumnError: no column matches a parameter of the function.
        """
        check_rows(prompts, completions, reward=self.name)
        batch = {"prompts": list(prompts), "completions": list(completions)}
        own = {name: list(values) for name, values in columns.items()}
        # Bisecting a batch in which every response hangs must not take hours.
        end = time.monotonic() + PATIENCE * self.deadline_s
        scores, reasons = self._scored(batch, own, end) if completions else ([], [])
        for score, reason in zip(scores, reasons, strict=True):
            if score is None:
                self.invalid[reason or "no score"] += 1
        return scores

    def _start(self) -> dict[str, Any]:
        first = self.worker.start()
        if first is not None and "failed" in first:
            self.worker.close()
            raise WorkerError(f"could not be loaded: {first['failed']}")
        return first or {}

    def _scored(
        self, batch: Mapping[str, list[Any]], columns: Mapping[str, list[Any]], end: float
    ) -> tuple[list[float | None], list[str | None]]:
        """Return scores and reasons; a batch that fails with an error is split in half."""
        rows = len(batch["completions"])
        if time.monotonic() >= end:
            return [None] * rows, ["function timed out"] * rows
        try:
            self._start()
            reply = self.worker.ask({**batch, "columns": columns}, self.deadline_s)
        except WorkerError as error:
            reply = {"scores": [None] * rows, "reasons": [str(error)] * rows, "raised": str(error)}
        if "missing" in reply:
            raise MissingColumnError(
                f"reward '{self.name}': its function needs '{reply['missing']}', which is not a "
                f"column of the data ({sorted(columns) or 'none'}). Rename a column, "
                "set it in 'args', or give the parameter a default value."
            )
        if reply.get("spent"):
            self.worker.close()
            # What it ran out of, earlier calls may have leaked: these responses have another try.
            if self._has_answered:
                self._has_answered = False
                return self._scored(batch, columns, end)
        self._has_answered |= not reply.get("raised")
        if reply.get("raised") and reply["reasons"][0] not in self._told:
            self._told.add(reply["reasons"][0])
            log.warning("reward %s: %s", self.name, reply["raised"])
        if rows == 1 or not reply.get("raised"):
            return reply["scores"], reply["reasons"]
        scores: list[float | None] = []
        reasons: list[str | None] = []
        # Bisect the batch to isolate the responses that fail.
        for part in (slice(0, rows // 2), slice(rows // 2, rows)):
            found = self._scored(_cut(batch, part), _cut(columns, part), end)
            scores, reasons = scores + found[0], reasons + found[1]
        return scores, reasons


def _cut(columns: Mapping[str, list[Any]], part: slice) -> dict[str, list[Any]]:
    return {name: values[part] for name, values in columns.items()}


def build_python(spec: PythonSpec) -> OwnReward:
    """Load the function of a spec in its worker.

    Raises:
        ValueError: the function cannot be loaded.
    """
    return OwnReward(spec)
