"""Run a stage's preflight: run the checks, write their card, and raise if one failed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from align.core import distributed
from align.core.artifacts import write_json_atomic
from align.core.card import CARD_FILE, TOKENS_FILE, VERDICTS, Card, table
from align.core.errors import AlignError, PreflightError
from align.data.token_view import View, plain
from align.preflight.checks import Check, examine

log = logging.getLogger(__name__)


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
