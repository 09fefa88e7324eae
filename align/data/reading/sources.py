"""Read rows from files, globs, folders and hub data sets, each with the place it came from."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.data.reading.json import Item, Row
from align.data.reading.readers import scan

_PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_SUFFIXES = (*_PLAIN, *(f"{s}.gz" for s in _PLAIN if s not in (".parquet", ".arrow")))
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.-]+)?$")


def read_rows(path: str) -> Iterator[tuple[Row, str]]:
    """Read every row of a data source together with its ``file:line`` (or ``file:row N``).

    Args:
        path: a file (jsonl, json, csv or tsv with any separator, parquet, arrow, txt; the texts
            also gzipped; what a file holds decides, not its name), a folder (all such files in it,
            by name), a glob, or a hub id ``owner/name`` with an optional ``:split`` when nothing
            of that name exists here. Environment variables are expanded.

    Returns:
        Dictionaries, or strings for .txt: its documents end at ``<|endoftext|>`` alone on a line,
        or at blank lines where the file has no such mark.

    Raises:
        DataError: nothing is found, or a file or one of its rows cannot be read.
    """
    for row, source in scan_rows(path):
        if isinstance(row, DataError):
            raise row
        yield row, source


def scan_rows(path: str) -> Iterator[Item]:
    """Read as ``read_rows`` does, but give what cannot be read as an error in a row's place."""
    files = find_files(path)
    if not files:
        yield from _read_hub(path)
    for file in files:
        yield from scan(file, name=str(file), suffix=suffix_of(file))


def find_files(path: str) -> list[Path]:
    """List the files a path means, in a fixed order; an empty list means a hub id.

    Raises:
        DataError: the path names nothing and does not look like ``owner/name``.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "$" in expanded:
        raise DataError(f"{path}: an environment variable in it is not set", code="D001")
    here = Path(expanded)
    if here.is_file() or (here.is_symlink() and not here.exists()):
        return [_known(here)]
    if here.is_dir():
        found = sorted(p for p in here.rglob("*") if suffix_of(p) and not p.is_dir())
        if not found:
            raise DataError(f"{path}: the folder holds no {', '.join(_PLAIN)} file", code="D004")
        return found
    found = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if Path(p).is_file())
    if found:
        return [_known(p) for p in found]
    if _HUB_ID.match(path) and not suffix_of(here) and not here.parent.is_dir():
        return []
    raise DataError(f"{path}: no such file, folder or glob (from {Path.cwd()})", code="D001")


def data_fingerprint(path: str) -> list[dict[str, Any]]:
    """Give path, sha256 and number of rows of every file of a data source, for manifests."""
    files = find_files(path)
    if not files:
        digest, rows = hashlib.sha256(), 0
        for row, _ in read_rows(path):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8"))
            rows += 1
        return [{"path": path, "sha256": digest.hexdigest(), "rows": rows}]
    prints = []
    for file in files:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        rows = sum(1 for _ in read_rows(str(file)))
        prints.append({"path": str(file), "sha256": sha256, "rows": rows})
    return prints


def suffix_of(path: Path) -> str:
    """Give the suffix that says what a file holds, without ``.gz``; "" if it says nothing."""
    name = path.name.lower()
    suffix = next((s for s in _SUFFIXES if name.endswith(s)), "").removesuffix(".gz")
    return ".jsonl" if suffix == ".ndjson" else suffix


def _known(path: Path) -> Path:
    if not suffix_of(path):
        raise DataError(
            f"{path}: unknown kind of file; expected one of {', '.join(_PLAIN)}", code="D005"
        )
    return path


def _read_hub(path: str) -> Iterator[Item]:
    import datasets

    name, _, split = path.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client raises types of several libraries
        told = " ".join(str(error).split())
        message = (
            f"{path}: no such file or folder here, and not to be had from the hub: {told} Correct "
            "the name, log in if it is private (hf auth login), or download the data set where "
            "there is a network and give its folder"
        )
        yield DataError(message, code="D011"), path
        return
    for number, row in enumerate(data, start=1):
        yield dict(row), f"{path}:row {number}"
