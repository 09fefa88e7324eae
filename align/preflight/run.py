"""Run the preflight of a stage: its checks, the card they make, and the end where a line failed."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from align.core import distributed
from align.core.artefacts import write_json_atomic
from align.core.card import CARD_FILE, TOKENS_FILE, Card, table
from align.core.errors import AlignError, PreflightError
from align.data.token_view import View, plain
from align.preflight.checks import Check, examine

log = logging.getLogger(__name__)


def run_checks(stage: str, kind: str, checks: Sequence[Check]) -> Card:
    """Return the card of a stage; every rank gets that of the first rank."""
    return Card(stage, kind, distributed.broadcast_object(examine(checks)))


def keep_card(card: Card, out: Path, *, views: Callable[[], Sequence[View]] | None = None) -> None:
    """Write a stage's card and log it; every rank goes on, or none.

    Args:
        card: the same on every rank. out: the stage's folder.
        views: returns a few rows token by token, which are kept for the report.

    Raises:
        PreflightError: a line failed.
    """
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
    except AlignError as error:  # what refuses the rows is a line of the card
        log.warning("no rows are shown token by token: %s", error)
        return
    write_json_atomic(path, found)
