"""The preflight: run a stage's checks, write their card, and raise if one failed.

A check is a name and a function that returns a finding.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from align.core import distributed
from align.core.artifacts import write_json_atomic
from align.core.card import CARD_FILE, TOKENS_FILE, VERDICTS, Card, Line, table
from align.core.errors import AlignError, PreflightError
from align.core.rank_failures import Meeting
from align.data.token_view import View, plain

log = logging.getLogger(__name__)
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


def run_checks(stage: str, kind: str, checks: Sequence[Check]) -> Card:
    """Run the checks and return the stage's card: of each check the worst line of all ranks.

    Each rank checks an engine and a device of its own, so that a check may fail on one rank alone.
    """
    log.info("preflight: %d check%s", len(checks), "s"[: len(checks) != 1])
    parts = distributed.gather_objects(examine(checks))
    lines = []
    for found in zip(*parts, strict=True):
        rank = max(range(len(found)), key=lambda i: VERDICTS.index(found[i].verdict))
        line = found[rank]
        lines.append(replace(line, value=f"rank {rank}: {line.value}") if rank else line)
    return Card(stage, kind, lines)


def keep_card(card: Card, out: Path, *, views: Callable[[], Sequence[View]] | None = None) -> None:
    """Write and log a stage's card; all ranks continue, or all raise.

    Args:
        card: the same on every rank. out: the stage's folder.
        views: returns token views of a few rows, which are saved for the report.

    Raises:
        PreflightError: a line failed.
    """
    # Rank 0 writes before the barrier, so the card exists even if every rank raises below.
    if distributed.rank() == 0:
        write_json_atomic(out / CARD_FILE, card.plain())
        for line in table(card):
            log.info("%s", line)
        if views is not None:
            _keep_views(views, out / TOKENS_FILE)
    distributed.barrier()
    if card.failed:
        lines = "\n".join(f"  {x.name}: {x.value}: {x.remedy}" for x in card.failed)
        raise PreflightError(f"{card.stage}: the preflight failed, nothing was trained\n{lines}")


def _keep_views(views: Callable[[], Sequence[View]], path: Path) -> None:
    try:
        found = [plain(view) for view in views()]
    except AlignError as error:  # the card has a line for the same error
        log.warning("no token view of the rows: %s", error)
        return
    write_json_atomic(path, found)
