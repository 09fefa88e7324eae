"""Stream the rows of one file, for each file format; an unreadable row becomes an error.

Each reader yields ``(row or DataError, source)``, where the source is ``file:line`` (the line on
which the row starts) or ``file:row N``. Readers continue after an error if the format allows it.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.core.errors import DataError
from align.data.reading.bounds import Unpacked, max_batch, max_row, row_too_long, too_large
from align.data.reading.files import blocks, content_of, decoded
from align.data.reading.json import Item, read_lines, read_values
from align.data.reading.read_log import note_file
from align.recipe.schema.formats import ASKED
from reward_models.limits import memory_limit

if TYPE_CHECKING:
    import pyarrow as pa

SEPARATORS = ",;\t|"
_STATED = re.compile(r"\ufeff?sep=(.?)")
"""The line of a table that states its separator; without it once it is split at the separator."""
_TABLE_ADVICE = {
    "new-line character": "; its lines end in carriage returns alone: save it with line feeds",
    "expected after": "; a quote inside of a quoted cell is written twice",
    "unexpected end": "; a quote that opens a cell in this row is never closed",
}
_END_MARK = "<|endoftext|>"
_SNIFFED_LINES = 50
_ROW_FIELDS = frozenset(("messages", "conversations", "prompt", "chosen", "text", *ASKED))
_TURN_FIELDS = ("role", "content", "from", "value")


def scan(path: Path, *, name: str, suffix: str) -> Iterator[Item]:
    """Yield the rows of a file; the reader follows from the content, else from the suffix.

    Args:
        path: the file.
        name: its name in messages.
        suffix: ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.txt``, or "" to use only the content.
    """
    try:
        reader = reader_of(path, name=name, suffix=suffix)
    except DataError as error:
        yield error, name
        return
    yield from READERS[reader](path, name)


def reader_of(path: Path, *, name: str, suffix: str) -> str:
    """Return the reader of a file: a key of READERS.

    Raises:
        DataError: the file is not data.
    """
    content = content_of(path, name=name)
    if content != "text":
        return content
    head = _head(path, name)
    start = "".join(head).lstrip()[:1]
    if suffix in (".jsonl", ".json", ".parquet", ".arrow") or (not suffix and start in ("{", "[")):
        # One list, also in a file that is named .jsonl.
        if start == "[":
            return "values"
        return "lines" if suffix == ".jsonl" or _looks_like_lines(head) else "values"
    if suffix in (".csv", ".tsv", ".txt") and head and all(map(_is_row, head)):
        what = "train as plain text" if suffix == ".txt" else "split at its commas"
        raise DataError(
            f"{name}:1: rows of JSON Lines, which a {suffix} file would {what}. Rename the file to "
            ".jsonl.",
            code="D005",
        )
    if suffix in (".csv", ".tsv"):
        return "table"
    if suffix == ".txt" or not any(separator in "".join(head[:1]) for separator in SEPARATORS):
        return "text"
    return "table"


def _head(path: Path, name: str) -> list[str]:
    """Return the first non-blank lines that can be decoded."""
    for block, first in blocks(path, name=name):
        if isinstance(block, DataError):
            return []
        lines = itertools.islice(decoded(block, first, name=name), _SNIFFED_LINES)
        return [line for line, _ in lines if isinstance(line, str) and line.strip()]
    return []


def _is_row(line: str) -> bool:
    """Return whether a line is a JSON object with a field that begins a known format."""
    try:
        found = json.loads(line) if line.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not _ROW_FIELDS.isdisjoint(found)


def _looks_like_lines(head: list[str]) -> bool:
    """Return whether a .json file is JSON Lines: its second line also starts an object.

    A single object on one line is read in the same way by both readers.
    """
    return len(head) > 1 and head[1].startswith("{")


class _Lines:
    """Lines for a csv reader; decoding errors are collected in ``faults``."""

    def __init__(self, path: Path, name: str) -> None:
        self._blocks, self._name = blocks(path, name=name), name
        self.faults: list[DataError] = []

    def __iter__(self) -> Iterator[str]:
        for block, first in self._blocks:
            if isinstance(block, DataError):
                self.faults.append(block)
                return
            for line, _ in decoded(block, first, name=self._name):
                if isinstance(line, DataError):
                    self.faults.append(line)
                    yield "\n"
                else:
                    yield line


def _read_table(path: Path, name: str) -> Iterator[Item]:
    csv.field_size_limit(min(max_row(), 2**31 - 1))
    lines = _Lines(path, name)
    # strict: an unbalanced quote is an error, not a cell that swallows the rest of the file.
    reader = csv.reader(iter(lines), delimiter=_separator(_head(path, name)), strict=True)
    header: list[str] | None = None
    line = 0
    try:
        for cells in reader:
            source, line = f"{name}:{line + 1}", reader.line_num
            # Report undecodable lines at the row in which they occurred.
            for fault in lines.faults:
                yield fault, source
            lines.faults.clear()
            if not cells or (header is None and _STATED.fullmatch("".join(cells))):
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    message = f"{source}: a column name occurs twice in {header}"
                    yield DataError(message, code="D036"), source
                    return
            elif len(cells) != len(header):
                message = f"{source}: {len(cells)} cells, but the header has {len(header)}"
                yield DataError(message, code="D035"), source
            else:
                yield dict(zip(header, cells, strict=True)), source
        for fault in lines.faults:
            yield fault, name
    except csv.Error as error:
        if "field larger" in str(error):
            yield row_too_long(f"{name}:{line + 1}"), f"{name}:{line + 1}"
            return
        advice = next((text for part, text in _TABLE_ADVICE.items() if part in str(error)), "")
        message = f"{name}:{line + 1}: broken table: {error}{advice}"
        yield DataError(message, code="D037"), f"{name}:{line + 1}"


def _separator(head: list[str]) -> str:
    """Return the separator that splits most rows into as many cells as the first row.

    A first line ``sep=;``, as Excel writes and reads it, decides.
    """
    if head and (stated := _STATED.fullmatch(head[0].rstrip("\r\n"))) and stated[1]:
        return stated[1]

    def fitness(separator: str) -> tuple[int, int]:
        try:
            rows = [row for row in csv.reader(head, delimiter=separator) if row]
        except csv.Error:
            return 0, 0
        width = len(rows[0]) if rows else 0
        return (sum(len(row) == width for row in rows), width) if width > 1 else (0, 0)

    return max(SEPARATORS, key=fitness)


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a typed table as a file of JSON would have it.

    In a typed table, all objects of a column have the same fields, and null marks an absent field.
    If it were kept, it would for example be rendered as an argument of a tool call. A turn keeps
    its role and content. Dates and times become text, decimals numbers.
    """
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: object) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        pairs = value and all(isinstance(item, tuple) for item in value)
        value = _map(value) if pairs else [_plain(item) for item in value]
    if isinstance(value, dict):
        kept = ((k, v) for k, v in value.items() if v is not None or k in _TURN_FIELDS)
        return {key: _plain(item) for key, item in kept}
    if isinstance(value, Decimal):
        number = float(value)
        return int(value) if number.is_integer() else number
    return str(value) if isinstance(value, date | time | timedelta) else value


def _map(pairs: list[tuple[Any, Any]]) -> dict[str, Any] | list[list[Any]]:
    """Return a cell of a column of maps as an object, or as pairs if a key occurs twice."""
    found = {str(key): value for key, value in pairs}
    return (
        found if len(found) == len(pairs) else [[_plain(part) for part in pair] for pair in pairs]
    )


NUM_ROWS = 256
"""Number of rows of a typed table that are converted at a time."""
_ROW_BYTES = 64
"""Least memory of a row: a table can state any number of rows in a few bytes."""


def _rows_of(batch: "pa.RecordBatch") -> list[dict[str, Any]]:
    """Return a batch's rows; 0.1 of single precision stays 0.1, not 0.10000000149011612."""
    import pyarrow

    for at, column in enumerate(batch.schema):
        if pyarrow.types.is_float32(column.type):
            # By way of text: the shortest decimal that gives this float.
            digits = batch.column(at).cast(pyarrow.string()).cast(pyarrow.float64())
            batch = batch.set_column(at, column.name, digits)
    return batch.to_pylist()


def _parts(batch: "pa.RecordBatch") -> Iterator[Any]:
    """Yield a record batch in parts, whose values are written out: each with its own text."""
    import pyarrow

    for start in range(0, batch.num_rows, NUM_ROWS):
        part = batch.slice(start, NUM_ROWS)
        for at, column in enumerate(part.schema):
            if pyarrow.types.is_dictionary(column.type):
                part = part.set_column(at, column.name, part.column(at).dictionary_decode())
        yield part


def _read_typed(batches: Iterator[Any], path: Path, name: str, *, form: str) -> Iterator[Item]:
    """Yield the rows of a typed table within the limits on memory."""
    import pyarrow

    number, unpacked = itertools.count(1), Unpacked(path, name)
    parts = (part for batch in batches for part in _parts(batch))
    try:
        while True:
            with memory_limit(max_batch() // 2**20):
                part = next(parts, None)
                if part is None:
                    break
                unpacked.add(max(part.nbytes, _ROW_BYTES * part.num_rows))
                rows = _rows_of(part)
            for row in rows:
                yield plain_row(row), f"{name}:row {next(number)}"
        # Only a file that was read to its end has a hash.
        note_file(path)
    except MemoryError:
        what = f"the next {NUM_ROWS} rows take more than {max_batch() / 2**30:g} GiB"
        yield too_large(f"{name}:row {next(number)}", what), name
    except DataError as error:
        yield error, name
    except (pyarrow.ArrowException, OSError) as error:
        yield DataError(f"{name}: broken {form}: {error}", code="D010"), name


def _read_parquet(path: Path, name: str) -> Iterator[Item]:
    def batches() -> Iterator[Any]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            # In this thread: a failed allocation in one of pyarrow's ends the process.
            yield from table.iter_batches(batch_size=NUM_ROWS, use_threads=False)

    yield from _read_typed(batches(), path, name, form="parquet")


def _read_arrow(path: Path, name: str) -> Iterator[Item]:
    def batches() -> Iterator[Any]:
        import pyarrow
        import pyarrow.ipc

        # Not mapped: a file that is cut while it is read would end the process.
        with pyarrow.OSFile(str(path)) as source:
            if path.open("rb").read(6) == b"ARROW1":
                table = pyarrow.ipc.open_file(source)
                found = map(table.get_batch, range(table.num_record_batches))
            else:
                found = iter(pyarrow.ipc.open_stream(source))
            for batch in found:
                batch.validate(full=True)  # offsets that point outside of it would crash Python
                yield batch

    yield from _read_typed(batches(), path, name, form="arrow")


def _read_text(path: Path, name: str) -> Iterator[Item]:
    """Split plain text at ``<|endoftext|>`` alone on a line, or else at blank lines."""
    pieces = (block for block, _ in blocks(path, name=name))
    # The whole file decides how its documents are separated, so it is read twice.
    marked = any(_END_MARK.encode() in piece for piece in pieces if isinstance(piece, bytes))
    document: list[str] = []
    start, size, longest = 1, 0, max_row()
    for line, number in _text_lines(path, name):
        if isinstance(line, DataError):
            yield line, f"{name}:{number}"
            continue
        if line == _END_MARK if marked else not line.strip():
            yield from _document(document, start, name)
            document, start, size = [], number + 1, 0
        else:
            document.append(line)
            size += len(line)
            if size > longest:
                yield row_too_long(f"{name}:{start}"), f"{name}:{start}"
                return
    yield from _document(document, start, name)


def _text_lines(path: Path, name: str) -> Iterator[tuple[str | DataError, int]]:
    for block, first in blocks(path, name=name):
        if isinstance(block, DataError):
            yield block, first
            continue
        for line, number in decoded(block, first, name=name):
            is_text = isinstance(line, str)
            yield (line.removesuffix("\n").removesuffix("\r") if is_text else line), number


def _document(lines: list[str], start: int, name: str) -> Iterator[Item]:
    skipped = next((i for i, line in enumerate(lines) if line.strip()), None)
    if skipped is not None:
        yield "\n".join(lines).strip("\n"), f"{name}:{start + skipped}"


READERS: dict[str, Callable[[Path, str], Iterator[Item]]] = {
    "lines": read_lines,
    "values": read_values,
    "table": _read_table,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": _read_text,
}
