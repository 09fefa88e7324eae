"""Checks and findings: a check is a name and a function that returns a finding."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from align.core.card import Line
from align.core.errors import AlignError, PreflightError
from align.core.rank_failures import Meeting

Item = TypeVar("Item")
NUM_ROWS = 4
"""Maximum number of rows through which a check runs the model."""
MAX_SEEN = 32
"""Maximum number of a stage's examples that its checks use."""
Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check: the measured value, its bound, the verdict, and what to do."""

    value: str
    bound: str = ""
    verdict: Verdict = "ok"
    remedy: str = ""


Check = tuple[str, Callable[[], Finding]]


def examine(checks: Iterable[Check]) -> list[Line]:
    """Run checks in order and return one line each; an AlignError becomes a failed line.

    Raises:
        PreflightError: a check stopped here, while other ranks are still in it. They may wait in a
            collective of the check for this rank, which cannot come back to it.
    """
    lines, meeting = [], Meeting("checks")
    for name, check in checks:
        began, error = time.monotonic(), None
        try:
            found = check()
        except AlignError as raised:
            error, found = raised, Finding("stopped", "", "fail", str(raised))
        meeting.arrive()
        if error is not None and not meeting.all_arrived():
            raise PreflightError(
                f"the preflight failed, nothing was trained\n  {name}: stopped: {error}"
            ) from error
        seconds = round(time.monotonic() - began, 3)
        lines.append(Line(name, found.value, found.bound, found.verdict, found.remedy, seconds))
    return lines


def at_most(value: float, limit: float, *, unit: str, remedy: str, fails: bool = True) -> Finding:
    """Return the finding for an upper bound; a number that is not finite exceeds every bound."""
    held = math.isfinite(value) and value <= limit
    verdict = "ok" if held else "fail" if fails else "warn"
    return Finding(f"{value:.3g} {unit}".strip(), f"at most {limit:g}", verdict, remedy)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most ``count`` evenly spaced items of a sequence."""
    # Over all of them, since the first rows of a file are often alike: a whole step between them
    # would take only the first half of 2 * count - 1 items.
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
