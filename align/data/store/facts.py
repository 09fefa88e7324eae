"""Facts about all tokens of stored rows, counted in one pass over their columns."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from align.data.store.layout import sequences
from align.data.store.rows import Ints, StoredRows

NUM_PLACES = 5


@dataclass(slots=True)
class Places:
    """How many sequences something is true of, and the sources of the first few."""

    num: int = 0
    first: Sequence[str] = ()


@dataclass(slots=True)
class RowFacts:
    """Numbers about the sequences of all rows; a pair has two of them.

    Attributes:
        trained: trained tokens, all tokens, sequences, and the fewest trained of a sequence.
        untrained: the sequences that train nothing, or their first token.
        ends: how often each token ends a run of trained ones.
        wrong_ends: the runs that end in no stop token.
        begins: sequences that begin with one BOS, with two, and all.
        largest, longest, num_unknown: largest token, tokens of the longest sequence, unknown ones.
    """

    trained: tuple[int, int, int, int] = (0, 0, 0, 0)
    untrained: Places = field(default_factory=Places)
    ends: Counter[int] = field(default_factory=Counter)
    wrong_ends: Places = field(default_factory=Places)
    begins: tuple[int, int, int] = (0, 0, 0)
    largest: int = 0
    longest: int = 0
    num_unknown: int = 0


def row_facts(
    rows: StoredRows, *, stops: frozenset[int], bos: int | None, unknown: int
) -> RowFacts:
    """Return the facts about rows.

    Args:
        rows: of stores. stops: tokens that may end a turn. bos: first token of a row, or None.
        unknown: the unknown token, or -1.
    """
    found = RowFacts()
    num_trained = num_tokens = num = single = double = 0
    least: int | None = None
    for at, ids, mask, lengths in rows.chunks():
        last = np.cumsum(lengths) - 1
        first = last - lengths + 1
        counts = np.add.reduceat(mask, first, dtype=np.int64)
        least = int(counts.min()) if least is None else min(least, int(counts.min()))
        num, num_tokens = num + len(lengths), num_tokens + len(ids)
        num_trained += int(counts.sum())
        _add(found.untrained, rows, at, sides=((counts == 0) | mask[first]).nonzero()[0])
        # A run ends before a token that is not trained, and at the end of its sequence.
        after = np.append(mask[1:], False)
        after[last] = False
        ends = (mask & ~after).nonzero()[0]
        tokens, times = np.unique(ids[ends], return_counts=True)
        found.ends.update(dict(zip(tokens.tolist(), times.tolist(), strict=True)))
        wrong = ends[~np.isin(ids[ends], np.array(sorted(stops), dtype=np.int64))]
        _add(found.wrong_ends, rows, at, sides=np.searchsorted(last, wrong))
        if bos is not None:
            one = ids[first] == bos
            two = one & (lengths > 1) & (ids[np.minimum(first + 1, last)] == bos)
            single, double = single + int((one & ~two).sum()), double + int(two.sum())
        found.largest = max(found.largest, int(ids.max()))
        found.longest = max(found.longest, int(lengths.max()))
        found.num_unknown += int((ids == unknown).sum()) if unknown >= 0 else 0
    found.trained = (num_trained, num_tokens, num, least or 0)
    found.begins = (single, double, num)
    return found


def _add(places: Places, rows: StoredRows, at: int, *, sides: Ints) -> None:
    """Add sequences, counted from the first one of row ``at``."""
    places.num += len(sides)
    for side in sides[: NUM_PLACES - len(places.first)].tolist():
        per_row = len(sequences(rows[at]))
        found = sequences(rows[at + side // per_row])[side % per_row]
        places.first = [*places.first, found.source]
