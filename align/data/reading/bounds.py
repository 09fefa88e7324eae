"""Limits on what a data file may unpack to: a few bytes of a file can stand for gigabytes."""

import os
from collections.abc import Sequence
from pathlib import Path

from align.core.errors import DataError

SETTING = "ALIGN_MAX_UNPACKED_GIB"
FROM = "ALIGN_CACHE_FROM_MIB"
"""Environment variable with the size of a source's files, in MiB, from which it has a store."""
FROM_MIB = 32.0
MAX_ROW = 2**28
"""Largest row, in bytes."""
MAX_FILE = 2**36
"""Largest size that a compressed file may unpack to, in bytes."""
MAX_BATCH = 2**32
"""Largest memory for the next rows of a parquet or arrow file, in bytes."""
MAX_RATIO = 100
"""Largest ratio of unpacked to packed bytes, for files that unpack to more than MAX_ROW."""
CODE = "D014"
"""Code of a file or row that unpacks to too much."""


def is_large(files: Sequence[Path]) -> bool:
    """Return whether the rows of these files have a store.

    Raises:
        DataError: the setting is not a number.
    """
    given = os.environ.get(FROM)
    try:
        limit = FROM_MIB if given is None else float(given)
    except ValueError:
        raise DataError(f"{FROM}: found {given!r}, expected a number of MiB") from None
    try:
        return sum(file.stat().st_size for file in files) >= limit * 2**20
    except OSError:  # reading them reports the error
        return False


def max_row() -> int:
    """Return the largest row in bytes."""
    return _allowed(MAX_ROW)


def max_batch() -> int:
    """Return the largest memory in bytes for the next rows of a parquet or arrow file."""
    return _allowed(MAX_BATCH)


def is_set() -> bool:
    """Return True if the user has set the limit."""
    return SETTING in os.environ


def _allowed(limit: int) -> int:
    """Return a limit, or what the environment variable SETTING says instead.

    Raises:
        DataError: the variable is not a positive number.
    """
    given = os.environ.get(SETTING)
    if given is None:
        return limit
    try:
        gib = float(given)
    except ValueError:
        gib = 0.0
    if not 0.0 < gib < 2**30:
        raise DataError(f"{SETTING}: found {given!r}, expected a positive number of GiB")
    return int(gib * 2**30)


def too_large(where: str, what: str) -> DataError:
    """Return the error for a file that exceeds a limit."""
    return DataError(
        f"{where}: {what}. If you trust the file, raise the limit with {SETTING}=N", code=CODE
    )


def row_too_long(where: str) -> DataError:
    """Return the error for a row above MAX_ROW."""
    return too_large(where, f"a row of more than {max_row() / 2**20:,.0f} MiB")


class Unpacked:
    """A count of the bytes that a packed file has unpacked to."""

    def __init__(self, path: Path, name: str) -> None:
        self._packed, self._name, self._total = max(1, path.stat().st_size), name, 0
        self._limit = _allowed(MAX_FILE)
        self._is_set = is_set()

    def add(self, num_bytes: int) -> None:
        """Count further bytes.

        Raises:
            DataError: more than the limit, or implausibly many for the size of the file.
        """
        self._total += num_bytes
        ratio = self._total / self._packed
        if self._total > self._limit:
            raise too_large(self._name, f"unpacks to more than {self._limit / 2**30:g} GiB")
        if not self._is_set and self._total > MAX_ROW and ratio > MAX_RATIO:
            raise too_large(
                self._name,
                f"{self._packed:,} bytes unpack to more than {self._total / 2**20:,.0f} MiB, over "
                f"{MAX_RATIO} times their size",
            )
