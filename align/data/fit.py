"""Keep the rows that fit into a length, and record those that are dropped or cut."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from align.core.errors import DataError
from align.core.types import PairRow, PromptRow, TokenRow

logger = logging.getLogger(__name__)

AnyRow = TypeVar("AnyRow", TokenRow, PairRow, PromptRow)
NUM_PLACES = 5
"""Number of long rows that a message names."""
PROMPT_CUT = "prompt cut"
"""Ledger reason for a pair that is kept after the beginning of its prompt was cut off."""
RowPlace = tuple[str, int]
"""Source of a row and its number of tokens."""


def fit_rows(
    rows: Sequence[AnyRow],
    *,
    max_length: int,
    max_lost_frac: float,
    what: str,
    ledger: Path | None = None,
) -> tuple[list[AnyRow], int]:
    """Return the rows that fit into ``max_length``; responses are never cut.

    A sequence that is too long is dropped whole. The prompt of a pair is cut from the left as far
    as needed, equally for both responses, so that both survive. The pair is dropped if its longer
    response leaves no prompt token, or if the prompt must stay whole (``shared`` is False). Prompts
    longer than ``max_length`` are dropped whole.

    Args:
        rows: tokenized rows. max_length: tokens.
        max_lost_frac: largest fraction of rows that may be dropped.
        what: name of the data in messages.
        ledger: JSON Lines file to which every dropped or cut row is appended.

    Returns:
        The rows that are kept and the number of dropped rows.

    Raises:
        DataError: more than ``max_lost_frac`` of the rows, or all of them, are dropped.
    """
    fitted = [(row, fit_row(row, max_length=max_length)) for row in rows]
    kept = [new for _, new in fitted if new is not None]
    lost = [place_of(row) for row, new in fitted if new is None]
    cut = [place_of(row) for row, new in fitted if new is not None and new is not row]
    report_fit(
        (len(rows), len(kept)),
        lost=lost,
        cut=cut,
        max_length=max_length,
        max_lost_frac=max_lost_frac,
        what=what,
        ledger=ledger,
    )
    return kept, len(lost)


def report_fit(
    counts: tuple[int, int],
    *,
    lost: Sequence[RowPlace],
    cut: Sequence[RowPlace],
    max_length: int,
    max_lost_frac: float,
    what: str,
    ledger: Path | None,
) -> None:
    """Write down and log the rows that are dropped or cut; see ``fit_rows``.

    Args:
        counts: number of all rows and of those that are kept. lost, cut: the others.
        max_length, max_lost_frac, what, ledger: see ``fit_rows``.

    Raises:
        DataError: too many rows, or all of them, are dropped.
    """
    num, num_kept = counts
    # The ledger lists every affected row, even if the loss is allowed.
    for group, reason in ((lost, "too long"), (cut, PROMPT_CUT)):
        _write_down(group, ledger, reason=reason, max_length=max_length, what=what)
    if cut:
        short = f"{len(cut)} of {num} pairs were cut to {max_length} tokens"
        logger.warning("%s: the prompts of %s: %s", what, short, _places(cut, ledger))
    if len(lost) > max_lost_frac * num or not num_kept:
        longest = max((tokens for _, tokens in lost), default=0)
        raise DataError(
            f"{what}: {len(lost)} of {num} rows are longer than max_length {max_length}: "
            f"{_places(lost, ledger)}; the longest has {longest} tokens, and at most "
            f"{max_lost_frac:.1%} may be lost. Raise max_length, remove the long rows, or allow it "
            "with max_lost_frac",
            code="D114",
        )
    if lost:
        dropped = f"lost {len(lost)} of {num} rows longer than {max_length} tokens"
        logger.warning("%s: %s: %s", what, dropped, _places(lost, ledger))


def place_of(row: TokenRow | PairRow | PromptRow) -> RowPlace:
    """Return the source of a row and its number of tokens."""
    return row.source, _length(row)


def _places(rows: Sequence[RowPlace], ledger: Path | None) -> str:
    """Return the places of the first rows, and the file that lists all of them."""
    first = ", ".join(f"{source} ({tokens} tokens)" for source, tokens in rows[:NUM_PLACES])
    if len(rows) <= NUM_PLACES:
        return first or "no rows"
    everywhere = ledger or "the output of 'align data check' with --model and --max-length"
    return f"{first} and {len(rows) - NUM_PLACES} more, all in {everywhere}"


def _write_down(
    rows: Sequence[RowPlace], ledger: Path | None, *, reason: str, max_length: int, what: str
) -> None:
    if ledger is None or not rows:
        return
    with ledger.open("a", encoding="utf-8") as out:
        for source, tokens in rows:
            entry = {"source": source, "reason": reason, "tokens": tokens}
            entry |= {"max_length": max_length, "of": what}
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _length(row: TokenRow | PairRow | PromptRow) -> int:
    if isinstance(row, PairRow):
        return max(len(row.chosen.input_ids), len(row.rejected.input_ids))
    return len(row.input_ids)


def fit_row(row: AnyRow, *, max_length: int) -> AnyRow | None:
    """Return a row unchanged or, for a pair, with its prompt cut; None if it cannot fit."""
    if _length(row) <= max_length:
        return row
    return cast(AnyRow | None, _cut_pair(row, max_length)) if isinstance(row, PairRow) else None


def _cut_pair(pair: PairRow, max_length: int) -> PairRow | None:
    # Both sides lose the same tokens, so the prompt stays shared.
    over = _length(pair) - max_length
    if over <= 0:
        return pair
    head = pair.num_head_tokens
    if over >= pair.num_prompt_tokens - head or not pair.shared:
        return None
    return replace(
        pair,
        chosen=_cut(pair.chosen, head, over),
        rejected=_cut(pair.rejected, head, over),
        num_prompt_tokens=pair.num_prompt_tokens - over,
    )


def _cut(row: TokenRow, head: int, count: int) -> TokenRow:
    """Return a row without ``count`` tokens after its first ``head`` ones."""
    ids, trained = (x[:head] + x[head + count :] for x in (row.input_ids, row.trained))
    return replace(row, input_ids=ids, trained=trained)
