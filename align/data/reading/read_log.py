"""The sha256 of every data file that this process has parsed, taken from the parsed bytes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from align.core.errors import DataError

_parsed: dict[str, str] = {}
_rows: dict[str, int] = {}
_expected: dict[str, str] | None = None


def expect(sha256_of: Mapping[str, str] | None) -> None:
    """Set what the files of this process's stage must hold; None allows any content."""
    global _expected
    _parsed.clear()
    _rows.clear()
    _expected = None if sha256_of is None else dict(sha256_of)


def parsed_sha256(path: Path) -> str | None:
    """Return the sha256 of a file as it was parsed last; None if it was not."""
    return _parsed.get(str(path))


def num_rows(path: Path) -> int | None:
    """Return the number of rows of a file that was read to its end; None if it was not."""
    return _rows.get(str(path))


def note_rows(path: Path, count: int) -> None:
    """Remember how many rows a file has."""
    _rows[str(path)] = count


def note(path: Path, sha256: str) -> None:
    """Remember the sha256 of the bytes that were parsed.

    Raises:
        DataError: the file changed since the stage began.
    """
    if _expected is not None:
        before = _expected.setdefault(str(path), sha256)
        if before != sha256:
            raise DataError(
                f"{path}: changed while the stage was reading it (sha256 {before[:12]} became "
                f"{sha256[:12]}); leave it as it is and run the command again",
                code="D003",
            )
    _parsed[str(path)] = sha256


def note_file(path: Path) -> None:
    """Remember the sha256 of a file that a library reads by itself."""
    with path.open("rb") as f:
        note(path, hashlib.file_digest(f, "sha256").hexdigest())


class HashedFile:
    """Hash an open file while it is read from beginning to end."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        piece = self._stream.read(size)
        self._digest.update(piece)
        return piece

    def finish(self) -> None:
        """Read what is left, and remember the hash of it all."""
        while self.read(2**22):
            pass
        note(self._path, self._digest.hexdigest())
