"""The comparison of training data with held-out prompts, which is remembered for stored rows."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.core.types import Example
from align.data.store.columns import record
from align.data.store.folder import open_or_build
from align.data.store.rows import StoredExamples
from align.data.text.contamination import Contamination, find_contamination


def contamination(
    train: Sequence[Example], sides: Mapping[str, Sequence[Example]]
) -> dict[str, Contamination]:
    """Return ``find_contamination``; of stored rows, a result for the same rows is read again."""
    if not isinstance(train, StoredExamples):
        return find_contamination(train, sides)
    # The key is a hash of all rows on both sides, so that a changed row is compared anew.
    held = hashlib.sha256(train.identity().encode())
    for name, rows in sides.items():
        held.update(name.encode())
        for example in rows:
            held.update(record(example))

    def compare(_folder: Path) -> dict[str, Any]:
        return {"found": {k: asdict(c) for k, c in find_contamination(train, sides).items()}}

    _, known = open_or_build(held.hexdigest()[:32], compare)
    return {
        name: Contamination(**{**found, "places": [tuple(both) for both in found["places"]]})
        for name, found in known["found"].items()
    }
