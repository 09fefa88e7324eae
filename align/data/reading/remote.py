"""Data at a URL: each file is downloaded once, below a folder that mirrors where it comes from.

What reads the data gets the path of the copy, so that hashes, splits, checks and messages are those
of files on this machine. The file systems are those of fsspec.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from align.core.errors import DataError
from align.core.locks import held
from align.core.storage import storage_problem, user_caches

log = logging.getLogger(__name__)
PLACE = "ALIGN_DOWNLOADS"
"""Environment variable with the folder of the copies."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_VERSION = (
    *("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "content_md5", "generation", "blob_id"),
    *("Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created"),
)
"""Facts about a file that change with its content; each file system tells others."""
_found: dict[str, str] = {}
"""Copies of this process, by URL: all of its readings see one version."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a file system, with what that tells of it."""

    system: Any
    name: str
    info: Mapping[str, Any]


def is_remote(path: str) -> bool:
    """Return whether a path is a URL, such as s3://bucket/rows.jsonl."""
    return _URL.match(path) is not None


def downloads() -> Path:
    """Return the folder of all copies."""
    if given := os.environ.get(PLACE):
        return Path(given)
    return user_caches() / "align" / "files"


def check_url(url: str) -> None:
    """Check, without a connection, that this installation can read from a URL.

    Raises:
        DataError: what it begins with is unknown, or a package for it is missing.
    """
    _file_system(url)


def local_copy(url: str, *, wanted: Callable[[Path], object]) -> str:
    """Return the path of the copy of a file, folder or pattern; it is brought up to date.

    Args:
        url: of a file, a folder, or files with ``*`` in their names.
        wanted: tells by their names which files hold data.

    Raises:
        DataError: it cannot be read and there is no copy; or the copy cannot be written.
    """
    if url not in _found:
        system, remote = _file_system(url)
        target = downloads() / _mirrored(url, remote)
        try:
            listed = _listed(system, remote, wanted)
        # File systems raise errors of several libraries.
        except Exception as error:
            if not _copies(target):
                raise _unreadable(url, _told(error)) from error
            log.warning("%s: cannot be reached; its copy %s is used: %s", url, target, _told(error))
        else:
            files = {downloads() / _mirrored(url, file.name): file for file in listed}
            # A folder or a pattern stands for what is there now.
            for gone in set(_copies(target)) - files.keys():
                gone.unlink(missing_ok=True)
            for copy, file in files.items():
                _bring(file, copy)
        _found[url] = str(target)
    return _found[url]


def clean() -> int:
    """Remove all copies; return the bytes that are freed."""
    freed = size()
    shutil.rmtree(downloads(), ignore_errors=True)
    return freed


def size() -> int:
    """Return the bytes of all copies."""
    return sum(path.stat().st_size for path in downloads().rglob("*") if path.is_file())


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    protocol = url.partition("://")[0]
    if protocol in ("file", "local") or "::" in url:
        told = "a chain of file systems" if "::" in url else "a file of this machine"
        raise DataError(f"{url}: {told}. Write one plain path or URL", code="D015")
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    # The packages of file systems check their settings in several ways.
    except Exception as error:
        raise DataError(
            f"{url}: {protocol}:// cannot be read here: {_told(error)}. Install the package for "
            "it, or download the data and use its path",
            code="D015",
        ) from error


def _listed(system: Any, remote: str, wanted: Callable[[Path], object]) -> list[_File]:
    """Return the files that a path in a file system stands for."""
    if "*" in remote:
        found = system.glob(remote, detail=True)
    else:
        info = system.info(remote)
        if info["type"] != "directory":
            # A page of a web server that lists a folder is a file, too.
            if not wanted(_mirrored(remote, remote)):
                raise ValueError("unknown file type; expected the address of a data file")
            return [_File(system, remote, info)]
        found = system.find(remote, detail=True)
        paths = {name: Path(name) for name in found if not Path(name).name.startswith(".")}
        found = {name: found[name] for name, path in paths.items() if wanted(path)}
    files = [_File(system, *entry) for entry in found.items() if entry[1]["type"] != "directory"]
    if not files:
        raise FileNotFoundError("no data file is there")
    return files


def _mirrored(url: str, remote: str) -> Path:
    """Return where the copy of a file is, below the folder of all copies."""
    protocol = url.partition("://")[0].lower()
    host, path, query = "", remote, ""
    if is_remote(remote):  # of http, whose paths are URLs
        parts = urlsplit(remote)
        host, path, query = parts.netloc.rpartition("@")[2], parts.path, parts.query
    names = [name for name in path.split("/") if name]
    if ".." in names:
        raise DataError(f"{url}: '..' in it. Write the path without it", code="D015")
    # A query chooses among contents, as names do; it may be too long for a name.
    chosen = [hashlib.sha256(query.encode()).hexdigest()[:12]] if query else []
    return Path(protocol, *filter(None, [host]), *names[:-1], *chosen, *names[-1:])


def _copies(target: Path) -> list[Path]:
    """Return the copies that a file, a folder or a pattern on this machine stands for."""
    found = map(Path, glob(str(target), recursive=True)) if "*" in str(target) else [target]
    inside = (path for place in found for path in (place, *place.rglob("*")))
    return [path for path in inside if path.is_file() and not path.name.startswith(".")]


def _bring(file: _File, copy: Path) -> None:
    """Download a file unless its copy is of the same version."""
    told = {name: str(file.info[name]) for name in _VERSION if file.info.get(name)}
    version = json.dumps({**told, "size": file.info.get("size")}, sort_keys=True)
    note = copy.with_name(f".{copy.name}.version")
    try:
        with held(copy.with_name(f".{copy.name}.lock"), waiting=f"waiting for {copy}"):
            if copy.is_file() and note.is_file() and note.read_text("utf-8") == version:
                return
            if not told:
                log.warning(
                    "%s: its server tells no version, so a change that keeps its size is not "
                    "noticed. After one, remove the copy: %s",
                    file.name,
                    copy,
                )
            # A copy without a note is downloaded again, should this process end before it is there.
            note.unlink(missing_ok=True)
            _download(file, copy)
            note.write_text(version, "utf-8")
    except OSError as error:
        if (reason := storage_problem(error, copy.parent)) is None:
            raise _unreadable(file.name, _told(error)) from error
        raise DataError(
            f"{file.name}: cannot be copied: {reason}. Free space there, or name another folder "
            f"with {PLACE}",
            code="D015",
        ) from error


def _download(file: _File, copy: Path) -> None:
    """Write the copy of a file; it has its name once it is whole."""
    from fsspec.callbacks import DEFAULT_CALLBACK, TqdmCallback

    for left in copy.parent.glob(f".{copy.name}.part-*"):  # of a process that was killed
        left.unlink()
    part = copy.with_name(f".{copy.name}.part-{os.getpid()}")
    shown = {"desc": copy.name, "unit": "B", "unit_scale": True}
    bar = TqdmCallback(tqdm_kwargs=shown) if sys.stderr.isatty() else DEFAULT_CALLBACK
    size = file.info.get("size")
    log.info("downloading %s%s", file.name, f" ({size / 2**20:,.1f} MiB)" if size else "")
    try:
        file.system.get_file(file.name, str(part), callback=bar)
        came = part.stat().st_size
        if size not in (None, came):
            raise _unreadable(file.name, f"{came} of {size} bytes came")
        part.replace(copy)
    except (OSError, DataError):
        raise
    # File systems raise errors of several libraries.
    except Exception as error:
        raise _unreadable(file.name, _told(error)) from error
    finally:
        part.unlink(missing_ok=True)


def _unreadable(url: str, told: str) -> DataError:
    return DataError(
        f"{url}: cannot be read: {told[:500]}. Check the address and the credentials, or download "
        "the data and use its path",
        code="D015",
    )


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
