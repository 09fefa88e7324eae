"""The folder of the stores: where it is, who builds, and how it stays bounded.

A store is built in a hidden folder and renamed when it is whole, so one of a killed process is
never used. Processes that need the same store wait for a file lock, which the system releases when
its holder ends; they hold no collective meanwhile.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.core.artifacts import read_json_object
from align.core.errors import AlignError, DataError
from align.core.locks import held
from align.core.storage import storage_problem, user_caches

log = logging.getLogger(__name__)
PLACE = "ALIGN_CACHE"
"""Environment variable with the folder of the stores."""
LARGEST = "ALIGN_CACHE_GIB"
"""Environment variable with the size in GiB above which the least recently used are removed."""
LARGEST_GIB = 50.0
META = "meta.json"
_BUILDING = ".building-"


def cache_folder() -> Path:
    """Return the folder of all stores."""
    if given := os.environ.get(PLACE):
        return Path(given)
    return user_caches() / "align" / "rows"


def open_or_build(key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a store and its description; one process builds it if it is missing.

    Args:
        key: names the content.
        build: writes the store into an empty folder and returns its description.

    Raises:
        DataError: the folder cannot be written. Errors of ``build`` are raised as they are.
    """
    root = cache_folder()
    final = root / key
    if (meta := read_json_object(final / META)) is not None:
        return _used(final), meta
    try:
        # A fixed number of files for locks, since removing one would let two processes in.
        lock = root / "locks" / key[:2]
        with held(lock, waiting="waiting for another process that tokenizes the rows"):
            # Another process may have built it while this one waited.
            if (meta := read_json_object(final / META)) is not None:
                return _used(final), meta
            meta = _build(root, key, build)
            prune(keep=final)
            return final, meta
    except AlignError:
        raise
    except OSError as error:
        reason = storage_problem(error, root) or f"{root}: {error.strerror or error}"
        raise DataError(
            f"{reason}. Tokenized rows of large data sets are kept there; free space with 'align "
            f"cache --clean', or name another folder with {PLACE}"
        ) from error


def _build(root: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    for left in root.glob(f"{_BUILDING}{key}-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    folder = root / f"{_BUILDING}{key}-{os.getpid()}"
    folder.mkdir()
    try:
        meta = build(folder)
        with (folder / META).open("w", encoding="utf-8") as f:
            json.dump(meta, f)
        # Written to the disk before the name: a crash of the machine leaves no half store.
        for path in folder.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(root / key, ignore_errors=True)
        folder.rename(root / key)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return meta


def _used(folder: Path) -> Path:
    try:
        os.utime(folder / META)
    except OSError:  # a folder that may only be read
        log.debug("%s: its last use cannot be noted", folder)
    return folder


def stores() -> list[tuple[Path, dict[str, Any], int]]:
    """Return every whole store with its description and its size, the last used one first."""
    found = []
    for path in cache_folder().glob(f"*/{META}"):
        meta = read_json_object(path)
        try:
            size = sum(file.stat().st_size for file in path.parent.iterdir())
            used = path.stat().st_mtime
        except OSError:  # removed meanwhile
            continue
        if meta is not None:
            found.append((used, path.parent, meta, size))
    return [entry[1:] for entry in sorted(found, key=lambda entry: entry[0], reverse=True)]


def prune(*, keep: Path | None = None, limit_gib: float | None = None) -> int:
    """Remove the least recently used stores above the limit, and return the bytes that are freed.

    A process that reads a store keeps its open files.

    Args:
        keep: a store that stays. limit_gib: size of the rest; None is the setting.
    """
    limit = (_limit_gib() if limit_gib is None else limit_gib) * 2**30
    total = freed = 0
    for folder, _, size in stores():
        total += size
        if total > limit and folder != keep:
            remove(folder)
            freed += size
    return freed


def remove(folder: Path) -> None:
    """Remove a store, first its description: what is left of it is never used."""
    (folder / META).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def clean() -> int:
    """Remove every store, and what killed processes left; return the bytes that are freed."""
    freed = prune(limit_gib=0.0)
    for left in cache_folder().glob(f"{_BUILDING}*"):
        if not _is_building(left):
            shutil.rmtree(left, ignore_errors=True)
    return freed


def _is_building(folder: Path) -> bool:
    """Return whether the process that builds a folder holds its lock."""
    key = folder.name.removeprefix(_BUILDING)
    path = cache_folder() / "locks" / key[:2]
    if not path.is_file():
        return False
    with path.open("r") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _limit_gib() -> float:
    given = os.environ.get(LARGEST)
    try:
        limit = LARGEST_GIB if given is None else float(given)
    except ValueError:
        limit = -1.0
    if not limit >= 0.0:
        raise DataError(f"{LARGEST}: found {given!r}, expected a number of GiB from 0")
    return limit
