"""Columns of a store: files of numbers or of records, read in place and checked when opened.

They are not mapped into memory: mapped pages count as memory of the process, and a file that is cut
while it is used would end the process.
"""

import io
import os
import pickle
from dataclasses import is_dataclass
from datetime import timezone, tzinfo
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import DTypeLike, NDArray

from align.core.errors import DataError

_BLOCK = 2**22
_BROKEN = (AttributeError, ImportError, MemoryError, TypeError, ValueError)


class Mark(NamedTuple):
    """Size in bytes and hash of a column."""

    size: int
    hash: str


class ColumnWriter:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        import xxhash

        self._file, self._hash = path.open("wb"), xxhash.xxh3_128()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Append bytes, which other processes can read at once."""
        self._file.write(data)
        self._file.flush()
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> Mark:
        """Close the file and return its size and hash."""
        self._file.close()
        return Mark(self.size, self._hash.hexdigest())


class Column:
    """Bytes of a file, read in place. They stay readable when the file is removed."""

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read(self, start: int, size: int) -> bytes:
        """Return a part of the file.

        Raises:
            DataError: the file is shorter.
        """
        found = os.pread(self._fd, size, start)
        while len(found) < size:
            more = os.pread(self._fd, size - len(found), start + len(found))
            if not more:
                raise DataError(
                    f"{self._path}: shorter than when it was opened. Do not change the folder "
                    "during a run, and run the command again"
                )
            found += more
        return found

    def has(self, mark: Mark) -> bool:
        """Return whether the file has this size and hash."""
        import xxhash

        if os.fstat(self._fd).st_size != mark.size:
            return False
        found = xxhash.xxh3_128()
        for start in range(0, mark.size, _BLOCK):
            found.update(self.read(start, min(_BLOCK, mark.size - start)))
        return found.hexdigest() == mark.hash

    def array(self, dtype: DTypeLike) -> NDArray[Any]:
        """Return the whole file as numbers in memory."""
        data = self.read(0, os.fstat(self._fd).st_size)
        return np.frombuffer(data, dtype=dtype) if data else np.empty(0, dtype=dtype)


_classes: dict[tuple[str, str], Any] = {}
"""Classes that records may be of, by module and name, once they were found."""


class _Reader(pickle.Unpickler):
    """An unpickler of data: it makes values, and builds no object of any other class."""

    _PLAIN = frozenset(
        [("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")]
        + [("decimal", "Decimal"), ("uuid", "UUID"), (__name__, "_zone")]
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return a data class of this project, or the class of a date or a number."""
        name = (module_name, global_name)
        # Every record names its class; looking for it costs more than all else of a record.
        if (known := _classes.get(name)) is not None:
            return known
        # A dot would reach from a module into what it imports.
        if name not in self._PLAIN and (not module_name.startswith("align.") or "." in global_name):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not data")
        found = super().find_class(module_name, global_name)
        if name not in self._PLAIN and not is_dataclass(found):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not data")
        return _classes.setdefault(name, found)


def _zone(name: str) -> ZoneInfo:
    """Return a time zone; it is written by its name, since its class is pickled as a call."""
    return ZoneInfo(name)


class _Writer(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, tzinfo) and not isinstance(obj, timezone):
            return _zone, (str(obj),)
        return NotImplemented


def record(value: object) -> bytes:
    """Return the bytes of one value."""
    out = io.BytesIO()
    _Writer(out, protocol=5).dump(value)
    return out.getvalue()


def value_of(data: bytes) -> Any:
    """Return the value of a record.

    Raises:
        DataError: it is not as ``record`` writes it.
    """
    try:
        return _Reader(io.BytesIO(data)).load()
    # What a damaged pickle raises depends on where it is damaged.
    except (pickle.UnpicklingError, EOFError, LookupError, *_BROKEN) as error:
        raise DataError(
            f"a record of the tokenized rows on disk cannot be read: {error}. Remove them with "
            "'align cache --clean' and run the command again"
        ) from error
