"""Results of a long pass over rows, kept on disk so that an interrupted pass continues."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core import distributed
from align.core.identity import plain
from align.core.storage import MIB, write_patiently

log = logging.getLogger(__name__)


class ResultFile:
    """Results by micro-batch, one line each, which is written when it is computed.

    Each line ends with a hash of the rest: a line that a killed process left incomplete, or that
    was damaged, is computed again. Floats are written so that they read back bit-identical.

    Attributes:
        path: the file; each rank has its own.
        key: identity of the pass. A file with another key is replaced.
        what: what is computed, for the lines about its progress.
    """

    def __init__(self, path: Path, *, key: Mapping[str, Any], what: str) -> None:
        self.path, self.what = path, what
        self._key = _digest(plain(key))
        self._known = self._load()
        if self._known:
            log.info("%s: %d finished batches are in %s", what, len(self._known), path)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)

    def read(self, number: int, rows: Sequence[int]) -> list[Any] | None:
        """Return the results of micro-batch ``number``; None if it is not there with these rows."""
        found = self._known.get(number)
        if found is None or found["rows"] != list(rows) or len(found["results"]) != len(rows):
            return None
        return found["results"]

    def write(self, number: int, rows: Sequence[int], results: Sequence[Any]) -> None:
        """Append the results of micro-batch ``number``; wait for space if the disk is full."""
        if not rows:
            return
        line = {"key": self._key, "batch": number, "rows": list(rows), "results": list(results)}
        # The line break comes first: it ends what a failed write may have left.
        text = "\n" + json.dumps({**line, "sha256": _digest(line)})
        write_patiently(
            lambda: self._append(text),
            folder=self.path.parent,
            needed=MIB,
            stop=distributed.was_asked,
        )

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _load(self) -> dict[int, dict[str, Any]]:
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return {}
        found = {}
        for line in lines:
            row = _intact(line)
            if row is not None and row["key"] == self._key:
                found[row["batch"]] = row
        return found


def _intact(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line if its hash is right."""
    try:
        row = json.loads(line)
        expected = row.pop("sha256")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None
    return row if isinstance(row, dict) and _digest(row) == expected else None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
