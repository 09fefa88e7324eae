"""Find near-duplicate rows: rows that share a sketch are compared by MinHash and exactly."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from align.data.check.findings import Finding, Tally
from align.data.check.whole import Rows
from align.data.text.ngrams import minhash, shingles, similarity

THRESHOLD = 0.9
"""Jaccard similarity of word triples."""
MAX_CANDIDATES = 20_000
_PERMUTATIONS = 64
_BANDS = (10, 6)
"""Bands and rows of the index. 1 - (1 - 0.9^6)^10 = 0.999 of the pairs at 0.9 are compared."""
_MAX_COMPARED = 50
"""Largest number of rows in a MinHash bucket that a row is compared with."""


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
    """Find rows that share 90 % of their word triples with an earlier row.

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
    from datasketch import MinHashLSH  # imports scipy, so import it only when needed

    texts, keys = texts_of(looked_at), rows.column("key")
    # Each row is compared with the earlier rows that the index proposes.
    index = MinHashLSH(num_perm=_PERMUTATIONS, params=_BANDS)
    triples: dict[int, set[int]] = {}
    for i in looked_at:
        triples[i] = shingles(texts[i])
        own = minhash(triples[i], permutations=_PERMUTATIONS)
        others: list[Any] = index.query(own)[:_MAX_COMPARED]
        near = [
            k
            for k in others
            if (same_prompt or keys[i] != keys[k])
            and similarity(triples[i], triples[k]) >= THRESHOLD
        ]
        index.insert(i, own)
        if near:
            share = similarity(triples[i], triples[min(near)])
            where = f"shares {share:.0%} of its word triples with {rows.source(min(near))}"
            tally.add(
                Finding("D092", rows.source(i), where, excerpt=" ".join(texts[i].split())[:90])
            )
    if len(found) <= MAX_CANDIDATES:
        return ""
    of_all = f"{MAX_CANDIDATES:,} of {len(found):,}"
    return f"only {of_all} candidate rows were compared for near copies"
