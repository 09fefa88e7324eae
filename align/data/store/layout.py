"""The columns of a store, in which the tokens of a row are apart from the rest of it."""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from align.core.errors import AlignError
from align.core.types import PairRow, PromptRow, TokenRow
from align.data.store.columns import record

Packed = dict[str, bytes]
"""The bytes that some rows add to each column of COLUMNS."""
COLUMNS = ("ids", "trained", "lengths", "weights", "weighed", "shells", "shell_sizes", "plain")
"""Columns of rows. Per token of a side: its id (uint32), whether it is trained (uint8), and its
weight (float64) on sides that have weights. Per side: its length (uint32), and whether it has
weights (uint8). Per row: a record of all else, its size (uint32), and whether it is plain (uint8).
"""
Row = TokenRow | PairRow | PromptRow
R = TypeVar("R", TokenRow, PairRow, PromptRow)
Side = tuple[tuple[int, ...], tuple[bool, ...], tuple[float, ...]]
"""Token ids, mask and weights of one sequence of a row."""


class Job(NamedTuple):
    """The bytes of a chunk's examples in the file: the first one, and the size of each example."""

    start: int
    sizes: Sequence[int]


class Done(NamedTuple):
    """The rows of a chunk, or the first error of one of them; and what was logged meanwhile."""

    rows: Packed | None
    error: AlignError | None
    logged: list[tuple[int, str]]


def sequences(row: Row) -> Sequence[TokenRow | PromptRow]:
    """Return the sequences of a row: both of a pair, otherwise the row itself."""
    return (row.chosen, row.rejected) if isinstance(row, PairRow) else (row,)


def pack_rows(rows: Sequence[Any]) -> Packed:
    """Return the columns of some rows, which are all of one class."""
    parts: dict[str, list[bytes]] = {name: [] for name in COLUMNS}
    for row in rows:
        for side in sequences(row):
            ids = side.input_ids
            weights = getattr(side, "weights", ())
            parts["ids"].append(array("I", ids).tobytes())
            # A prompt has no mask: it trains nothing, one zero a token.
            parts["trained"].append(bytes(getattr(side, "trained", ())) or bytes(len(ids)))
            parts["lengths"].append(len(ids).to_bytes(4, "little"))
            if weights:
                parts["weights"].append(array("d", weights).tobytes())
            parts["weighed"].append(b"\1" if weights else b"\0")
        # What is left of a row without its tokens: sources, labels, margins.
        plain = is_plain(row)
        shell = _plain_record(row.source) if plain else record(_shell(row))
        parts["shells"].append(shell)
        parts["shell_sizes"].append(len(shell).to_bytes(4, "little"))
        parts["plain"].append(b"\1" if plain else b"\0")
    return {name: b"".join(found) for name, found in parts.items()}


def _plain_record(source: str) -> bytes:
    """Return the record of a plain row without its tokens, of which only the source differs."""
    data = source.encode("utf-8", "surrogatepass")
    # Nothing else in a record looks like a longer source.
    if len(data) < 16:
        return record(TokenRow((), (), source))
    start, end = _around_source(len(data))
    return start + data + end


@lru_cache(maxsize=256)
def _around_source(size: int) -> tuple[bytes, bytes]:
    """Return a plain row's record before and after a source of ``size`` bytes."""
    # From the right: before the source is its length, which may look like a part of it.
    start, _, end = record(TokenRow((), (), "-" * size)).rpartition(b"-" * size)
    return start, end


def is_plain(row: object) -> bool:
    """Return whether a row is a TokenRow that its tokens and its mask describe completely."""
    return type(row) is TokenRow and not row.weights and row.label_prob == 1.0


def _shell(row: R) -> R:
    """Return a row without its tokens."""
    if isinstance(row, PairRow):
        return replace(row, chosen=_shell(row.chosen), rejected=_shell(row.rejected))
    if isinstance(row, PromptRow):
        return replace(row, input_ids=())
    return replace(row, input_ids=(), trained=(), weights=())


def filled(shell: R, sides: Sequence[Side]) -> R:
    """Return the row of a shell and its sequences."""
    if isinstance(shell, PairRow):
        chosen, rejected = filled(shell.chosen, sides[:1]), filled(shell.rejected, sides[1:])
        return replace(shell, chosen=chosen, rejected=rejected)
    ids, trained, weights = sides[0]
    if isinstance(shell, PromptRow):
        return replace(shell, input_ids=ids)
    return replace(shell, input_ids=ids, trained=trained, weights=weights)


def side_of(ids: bytes, trained: bytes, weights: bytes) -> Side:
    """Return one sequence from its bytes."""
    mask = np.frombuffer(trained, np.bool_).tolist()
    return tuple(array("I", ids)), tuple(mask), tuple(array("d", weights))
