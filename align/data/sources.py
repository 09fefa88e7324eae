"""Read rows from files, globs, folders and hub data sets, each with the place it came from."""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from align.core.errors import DataError

Row = dict[str, Any] | str

_SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(?::[\w.-]+)?$")


def read_rows(path: str) -> Iterator[tuple[Row, str]]:
    """Read every row of a data source together with its ``file:line`` (or ``file:row N``).

    Args:
        path: a file (jsonl, json, csv, tsv, parquet, txt; jsonl and json also gzipped), a folder
            (all such files in it, by name), a glob, or a hub id ``owner/name`` with an optional
            ``:split`` when nothing of that name exists here. Environment variables are expanded.

    Returns:
        Dictionaries, or strings for .txt: its documents end at ``<|endoftext|>`` alone on a line,
        or at blank lines where the file has no such mark.

    Raises:
        DataError: nothing is found, the kind of file is unknown, or a file cannot be parsed.
    """
    files = find_files(path)
    if not files:
        yield from _read_hub(path)
        return
    for file in files:
        suffix = _suffix(file)
        yield from _READERS[suffix.removesuffix(".gz")](file)


def find_files(path: str) -> list[Path]:
    """List the files a path means, in a fixed order; an empty list means a hub id.

    Raises:
        DataError: the path names nothing and does not look like ``owner/name``.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "$" in expanded:
        raise DataError(f"{path}: an environment variable in it is not set")
    here = Path(expanded)
    if here.is_file():
        return [_known(here)]
    if here.is_dir():
        found = sorted(p for p in here.rglob("*") if p.is_file() and _suffix(p))
        if not found:
            raise DataError(f"{path}: the folder holds no {', '.join(_SUFFIXES)} file")
        return found
    found = sorted(Path(p) for p in glob.glob(expanded, recursive=True) if Path(p).is_file())
    if found:
        return [_known(p) for p in found]
    if _HUB_ID.match(path) and not _suffix(here) and not here.parent.is_dir():
        return []
    raise DataError(f"{path}: no such file, folder or glob (from {Path.cwd()})")


def data_fingerprint(path: str) -> list[dict[str, Any]]:
    """Give path, sha256 and number of rows of every file of a data source, for manifests."""
    files = find_files(path)
    if not files:
        digest, rows = hashlib.sha256(), 0
        for row, _ in _read_hub(path):
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


def _suffix(path: Path) -> str:
    return next((s for s in _SUFFIXES if path.name.lower().endswith(s)), "")


def _known(path: Path) -> Path:
    if not _suffix(path):
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(_SUFFIXES)}")
    return path


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _parse(text: str, *, path: Path, line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line + error.lineno - 1}:{error.colno}: broken JSON: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{line}: broken JSON: {error}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_jsonl(path: Path, text: str | None = None) -> Iterator[tuple[Row, str]]:
    # Not splitlines: U+2028 and its like are ordinary characters inside a JSON string.
    for number, line in enumerate((text or _read_text(path)).split("\n"), start=1):
        if line.strip():
            row = _parse(line.rstrip("\r"), path=path, line=number)
            yield _mapping(row, f"{path}:{number}"), f"{path}:{number}"


def _read_json(path: Path) -> Iterator[tuple[Row, str]]:
    text = _read_text(path)
    lines = [line for line in text.split("\n", 2)[:2] if line.strip()]
    if len(lines) == 2 and _is_object(lines[0]):
        # JSON Lines under a .json name: the first line is a whole object and more follow.
        yield from _read_jsonl(path, text)
        return
    start = len(text) - len(text.lstrip())
    if not text.strip():
        return
    if text[start] != "[":
        yield _mapping(_parse(text, path=path, line=1), f"{path}:1"), f"{path}:1"
        return
    yield from _read_array(text, start + 1, path=path)


def _read_array(text: str, at: int, *, path: Path) -> Iterator[tuple[Row, str]]:
    """Decode the elements of an array one by one, so that each has its line."""
    _parse(text, path=path, line=1)  # a broken file yields nothing at all
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    skip = re.compile(r"[\s,]*")
    while True:
        at = skip.match(text, at).end()  # type: ignore[union-attr]
        if text[at] == "]":
            return
        line += text.count("\n", counted, at)
        counted = at
        row, at = decoder.raw_decode(text, at)
        yield _mapping(row, f"{path}:{line}"), f"{path}:{line}"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _mapping(row: Any, source: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected an object with named fields, found {str(row)[:60]!r}")
    return row


def _read_table(path: Path, *, delimiter: str) -> Iterator[tuple[Row, str]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: a column name stands twice in {header}")
        line = reader.line_num
        for cells in reader:
            source = f"{path}:{line + 1}"
            line = reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{source}: {len(cells)} cells, but the header names {len(header)}")
            yield dict(zip(header, cells, strict=True)), source
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken table: {error}") from error


def _read_csv(path: Path) -> Iterator[tuple[Row, str]]:
    return _read_table(path, delimiter=",")


def _read_tsv(path: Path) -> Iterator[tuple[Row, str]]:
    return _read_table(path, delimiter="\t")


def _read_parquet(path: Path) -> Iterator[tuple[Row, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}:row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: broken parquet: {error}") from error


def _read_txt(path: Path) -> Iterator[tuple[Row, str]]:
    text = _read_text(path).replace("\r\n", "\n")
    border = r"^<\|endoftext\|>$" if "<|endoftext|>" in text else r"^\s*$"
    start = 0
    for end in [*re.finditer(border, text, flags=re.MULTILINE), None]:
        block = text[start : end.start() if end else len(text)]
        if block.strip():
            line = text.count("\n", 0, start + len(block) - len(block.lstrip())) + 1
            yield block.strip("\n"), f"{path}:{line}"
        start = end.end() if end else len(text)


def _read_hub(path: str) -> Iterator[tuple[Row, str]]:
    import datasets

    name, _, split = path.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client raises types of several libraries
        raise DataError(
            f"{path}: no such file here, and not to be had as a hub id: {error}"
        ) from error
    for number, row in enumerate(data, start=1):
        yield dict(row), f"{path}:row {number}"


_READERS: dict[str, Callable[[Path], Iterator[tuple[Row, str]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
