"""Record the sha256 of every data file that this process has parsed, from the parsed bytes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from align.core.errors import DataError

_parsed: dict[str, str] = {}
_rows: dict[str, int] = {}
_expected: dict[str, str] | None = None


def expect(sha256_of: Mapping[str, str] | None) -> None:
    """Set the expected sha256 of the stage's files; None allows any content."""
    global _expected
    _parsed.clear()
    _rows.clear()
    _expected = None if sha256_of is None else dict(sha256_of)


def announced() -> frozenset[str] | None:
    """Return the files that the running stage's identity names; None outside of a stage."""
    return None if _expected is None else frozenset(_expected)


def expected(path: Path) -> str | None:
    """Return the sha256 of a file when the stage began, or None."""
    return None if _expected is None else _expected.get(str(path))


def parsed_sha256(path: Path) -> str | None:
    """Return the sha256 of a file when it was last parsed, or None."""
    return _parsed.get(str(path))


def num_rows(path: Path) -> int | None:
    """Return the number of rows of a file that was read to its end, or None."""
    return _rows.get(str(path))


def note_rows(path: Path, count: int) -> None:
    """Record the number of rows of a file."""
    _rows[str(path)] = count


def note(path: Path, sha256: str) -> None:
    """Record the sha256 of the bytes that were parsed.

    Raises:
        DataError: the file changed since the stage began.
    """
    if _expected is not None:
        # A file that was not announced counts from its first reading.
        before = _expected.setdefault(str(path), sha256)
        if before != sha256:
            raise DataError(
                f"{path}: changed while the stage was reading it (sha256 {before[:12]} became "
                f"{sha256[:12]}). Do not change it during a run, and run the command again.",
                code="D003",
            )
    _parsed[str(path)] = sha256


def note_file(path: Path) -> None:
    """Record the sha256 of a file that a library reads directly."""
    with path.open("rb") as f:
        note(path, hashlib.file_digest(f, "sha256").hexdigest())


class HashedFile:
    """A file that is hashed while it is read from beginning to end."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        piece = self._stream.read(size)
        self._digest.update(piece)
        return piece

    def finish(self) -> None:
        """Read the rest of the file and record the hash of the whole."""
        while self.read(2**22):
            pass
        note(self._path, self._digest.hexdigest())
