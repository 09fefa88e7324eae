"""Checks over all rows: copies, near copies, contradictions, held-out prompts, labels, lengths."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from align.data.check.batch import COLUMNS, Part
from align.data.check.findings import Finding, Tally
from align.data.text.contamination import Wanted, is_contaminated, nearest_rows
from align.data.text.similarity import near_duplicates

MIN_PAIRS = 50
"""With fewer pairs of unequal length, a length bias may be chance."""
BIAS_SHARE = 0.7
MIN_PLACEHOLDER_SHARE = 0.1
NEAR = 0.9
"""Jaccard similarity of word triples from which two rows are near copies."""
MAX_CANDIDATES = 20_000


@dataclass(frozen=True, slots=True)
class Rows:
    """The valid rows of all files in one table, with the name of each row's file."""

    table: np.ndarray  # (R, len(COLUMNS)), uint64
    file_ids: np.ndarray  # (R,)
    names: Sequence[str]
    counted: Sequence[bool]
    """Whether the places of a file are row numbers instead of line numbers."""

    def column(self, name: str) -> np.ndarray:
        """Return one column."""
        return self.table[:, COLUMNS.index(name)]

    def source(self, i: int) -> str:
        """Return the place of a row."""
        file = self.file_ids[i]
        return f"{self.names[file]}:{'row ' * self.counted[file]}{self.table[i, 0]}"


def join(parts: Sequence[Part], counted: Mapping[str, bool]) -> Rows:
    """Return the rows of all parts in one table, in the order of the files."""
    names = list(dict.fromkeys(part.name for part in parts))
    ids = [np.full(len(part.table), names.index(part.name), np.int32) for part in parts]
    tables = [part.table for part in parts]
    return Rows(
        np.concatenate(tables) if tables else np.zeros((0, len(COLUMNS)), np.uint64),
        np.concatenate(ids) if ids else np.zeros(0, np.int32),
        names,
        [counted[name] for name in names],
    )


def repeats(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (i, first) for every row i whose value occurs at an earlier row; 0 means none."""
    # Sort stably, so that the first row of each run of equal values is the earliest one.
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    # Each sorted position points at the first position of its run of equal values.
    group = np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
    later = np.flatnonzero((group != np.arange(len(ordered))) & (ordered != 0))
    found = sorted(zip(order[later].tolist(), order[group[later]].tolist(), strict=True))
    yield from found


def look_at_all(rows: Rows, tally: Tally, *, heldout: Mapping[int, str]) -> None:
    """Find copies, ids that are not unique, contradictions and held-out prompts."""
    whole, key = rows.column("whole"), rows.column("key")
    for i, first in repeats(whole):
        tally.add(Finding("D090", rows.source(i), f"the same as {rows.source(first)}"))
    for i, first in repeats(rows.column("ident")):
        # Rows of one prompt may share an id: several responses to it.
        if key[i] != key[first]:
            tally.add(Finding("D091", rows.source(i), f"the same id as {rows.source(first)}"))
    for i, first in repeats(rows.column("same")):
        if whole[i] != whole[first]:
            tally.add(Finding("D093", rows.source(i), f"contradicts {rows.source(first)}"))
    if heldout:
        known = np.fromiter(heldout, np.uint64, len(heldout))
        for i in np.flatnonzero(np.isin(key, known)).tolist():
            found = f"the prompt is held out at {heldout[int(key[i])]}"
            tally.add(Finding("D100", rows.source(i), found))


def look_for_evaluation(prompts: Sequence[Wanted], rows: Sequence[Wanted], tally: Tally) -> None:
    """Find evaluation prompts that occur in the training rows, by the definition of the stages.

    Args:
        prompts: evaluation prompts with their runs of words.
        rows: training rows with those of the runs that they contain.
        tally: receives one finding per prompt, at the row that has most of its runs.
    """
    seen = set[int]().union(*(runs for _, runs in rows))
    bad = [(source, runs) for source, runs in prompts if is_contaminated(runs, seen)]
    for source, place in nearest_rows(bad, rows):
        tally.add(Finding("D101", place, f"contains the evaluation prompt at {source}"))


def look_at_balance(
    tally: Tally, *, kind: str, name: str, rows: int, labels: Counter[bool], longer: Counter[str]
) -> None:
    """Find labels of one class and a length bias; drop placeholder findings that are rare."""
    if kind == "unpaired" and len(labels) == 1:
        ((label, count),) = labels.items()
        tally.add(Finding("D081", name, f"all {count} labels are {str(label).lower()}"))
    pairs = longer.total()
    if pairs >= MIN_PAIRS and max(longer.values()) >= BIAS_SHARE * pairs:
        side, count = longer.most_common(1)[0]
        found = f"the {side} response has more words in {count} of {pairs} pairs of unequal length"
        tally.add(Finding("D078", name, found))
    if tally.counts["D122"] < MIN_PLACEHOLDER_SHARE * rows:
        tally.drop("D122")


def near_candidates(rows: Rows) -> np.ndarray:
    """Return the rows that share the low or the high end of their sketch with another row.

    Exact copies are excluded because they are found separately.
    """
    _, firsts = np.unique(rows.column("whole"), return_index=True)
    chosen = np.zeros(len(rows.table), bool)
    for column in ("low", "high"):
        # Rows that share 90 % of their words mostly share the smallest or the largest hash.
        values = rows.column(column)[firsts]
        _, group, count = np.unique(values, return_inverse=True, return_counts=True)
        chosen[firsts[(count[group] > 1) & (values != 0)]] = True
    return np.flatnonzero(chosen)


def look_for_near_copies(
    rows: Rows,
    tally: Tally,
    texts_of: Callable[[Sequence[int]], dict[int, str]],
    *,
    same_prompt: bool,
) -> str:
    """Find rows that share 90 % of their word triples with an earlier row that could be kept.

    Args:
        rows: all valid rows.
        tally: receives the findings.
        texts_of: returns the texts of rows.
        same_prompt: also compare rows with the same prompt, which repeat by design in
            preference and unpaired data.

    Returns:
        A note if not all candidates were compared, else "".
    """
    found = near_candidates(rows)
    looked_at = found[:MAX_CANDIDATES].tolist()
    if not looked_at:
        return ""
    by_row, keys = texts_of(looked_at), rows.column("key")[looked_at]
    texts = [by_row[row] for row in looked_at]
    pairs = near_duplicates(
        texts, threshold=NEAR, comparable=lambda i, j: same_prompt or keys[i] != keys[j]
    )
    for i, j, share in pairs:
        where = f"shares {share:.0%} of its word triples with {rows.source(looked_at[j])}"
        excerpt = " ".join(texts[i].split())[:90]
        tally.add(Finding("D092", rows.source(looked_at[i]), where, excerpt=excerpt))
    if len(found) <= MAX_CANDIDATES:
        return ""
    of_all = f"{MAX_CANDIDATES:,} of {len(found):,}"
    return f"only {of_all} candidate rows were compared for near copies"
