"""Find near-duplicate rows among those that share a sketch."""

from collections.abc import Callable, Sequence

import numpy as np

from align.data.check.findings import Finding, Tally
from align.data.check.whole import Rows
from align.data.text.similarity import near_duplicates

THRESHOLD = 0.9
"""Jaccard similarity of word triples."""
MAX_CANDIDATES = 20_000


def candidates(rows: Rows) -> np.ndarray:
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
    found = candidates(rows)
    looked_at = found[:MAX_CANDIDATES].tolist()
    if not looked_at:
        return ""
    by_row, keys = texts_of(looked_at), rows.column("key")[looked_at]
    texts = [by_row[row] for row in looked_at]
    pairs = near_duplicates(
        texts, threshold=THRESHOLD, comparable=lambda i, j: same_prompt or keys[i] != keys[j]
    )
    for i, j, share in pairs:
        where = f"shares {share:.0%} of its word triples with {rows.source(looked_at[j])}"
        excerpt = " ".join(texts[i].split())[:90]
        tally.add(Finding("D092", rows.source(looked_at[i]), where, excerpt=excerpt))
    if len(found) <= MAX_CANDIDATES:
        return ""
    of_all = f"{MAX_CANDIDATES:,} of {len(found):,}"
    return f"only {of_all} candidate rows were compared for near copies"
