"""Read the rows of one file of each format, streaming; a row that cannot be read is an error.

Each reader gives ``(row or DataError, source)`` where the source is ``file:line`` (the line a row
starts on) or ``file:row N``. Readers go on after an error where the format allows it.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.data.opening import blocks, chunks, content_of, decoded

Row = dict[str, Any] | str
Item = tuple[Row | DataError, str]

SEPARATORS = ",;\t|"
_END_MARK = "<|endoftext|>"
_SNIFFED_LINES = 50
_TAIL_CHARS = 2**16


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_SPACE = re.compile(r"[ \t\n\r]*")


def scan(path: Path, *, name: str, suffix: str) -> Iterator[Item]:
    """Read a file with the reader that fits its content, and its suffix where both may be.

    Args:
        path: the file. name: how messages call it.
        suffix: ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.txt``, or "" to go by content alone.
    """
    try:
        reader = reader_of(path, name=name, suffix=suffix)
    except DataError as error:
        yield error, name
        return
    yield from READERS[reader](path, name)


def reader_of(path: Path, *, name: str, suffix: str) -> str:
    """Name the reader of a file: a key of READERS.

    Raises:
        DataError: the file is no data.
    """
    content = content_of(path, name=name)
    if content != "text":
        return content
    head = _head(path, name)
    start = "".join(head).lstrip()[:1]
    if suffix in (".jsonl", ".json", ".parquet", ".arrow") or (not suffix and start in ("{", "[")):
        if start == "[":
            return "values"
        return "lines" if suffix == ".jsonl" or _looks_like_lines(head) else "values"
    if suffix in (".csv", ".tsv"):
        return "table"
    if suffix == ".txt" or not any(separator in "".join(head[:1]) for separator in SEPARATORS):
        return "text"
    return "table"


def _head(path: Path, name: str) -> list[str]:
    """Give the first lines that can be decoded, without blank ones."""
    for block, first in blocks(path, name=name):
        if isinstance(block, DataError):
            return []
        lines = itertools.islice(decoded(block, first, name=name), _SNIFFED_LINES)
        return [line for line, _ in lines if isinstance(line, str) and line.strip()]
    return []


def _looks_like_lines(head: list[str]) -> bool:
    """Say whether a .json file is JSON Lines: its second line begins an object as the first did.

    One whole object that stands alone on a line is read the same either way.
    """
    return len(head) > 1 and head[1].startswith("{")


def parse_lines(block: bytes, first: int, name: str) -> Iterator[Item]:
    """Parse a block of JSON Lines."""
    for line, number in decoded(block, first, name=name):
        source = f"{name}:{number}"
        if isinstance(line, DataError):
            yield line, source
        elif text := line.strip():
            yield _parse(text, line, source), source


def _parse(text: str, line: str, source: str) -> Row | DataError:
    try:
        return _mapping(_DECODER.decode(text), source)
    except json.JSONDecodeError as error:
        column = error.pos + 1 + len(line) - len(line.lstrip())
        return _broken(error.msg, f"{source}:{column}", at_end=error.pos >= len(text))
    except (ValueError, RecursionError) as error:
        return DataError(f"{source}: broken JSON: {error}", code="D033")


def _broken(message: str, where: str, *, at_end: bool) -> DataError:
    cut = at_end or message.startswith("Unterminated")
    what = "JSON that breaks off" if cut else "broken JSON"
    return DataError(f"{where}: {what}: {message}", code="D031" if cut else "D030")


def _mapping(row: Any, source: str) -> Row | DataError:
    if isinstance(row, dict):
        return row
    return DataError(
        f"{source}: expected an object with named fields, found {str(row)[:60]!r}", code="D032"
    )


def _read_lines(path: Path, name: str) -> Iterator[Item]:
    for block, first in blocks(path, name=name):
        if isinstance(block, DataError):
            yield block, f"{name}:{first}"
        else:
            yield from parse_lines(block, first, name)


class _Tape:
    """Hold the part of a JSON text that is being read, and the line of a place in it."""

    def __init__(self, path: Path, name: str) -> None:
        self._pieces = chunks(path, name=name)
        self.name, self.text, self.at = name, "", 0
        self._undecoded = b""
        self._mark, self._mark_line = 0, 1
        self.fault: DataError | None = None

    def more(self) -> bool:
        """Forget what was read and read as much again as is left; False at the end."""
        self.line_at(self.at)
        self._mark = 0
        self.text, self.at = self.text[self.at :], 0
        wanted, got = max(1, len(self.text)), 0
        while got < wanted and self.fault is None:
            piece = next(self._pieces, b"")
            if isinstance(piece, DataError):
                self.fault = piece
            elif not piece:
                if self._undecoded:
                    self._decode(b"", final=True)
                return got > 0
            else:
                got += len(piece)
                self._decode(piece, final=False)
        return self.fault is None

    def _decode(self, piece: bytes, *, final: bool) -> None:
        raw = self._undecoded + piece
        try:
            self.text += raw.decode("utf-8")
            self._undecoded = b""
        except UnicodeDecodeError as error:
            self.text += raw[: error.start].decode("utf-8")
            self._undecoded = raw[error.start :]
            if final or len(self._undecoded) > 3:
                self.fault = DataError(
                    f"{self.line_at(len(self.text))}: byte {raw[error.start]:#04x} is not UTF-8; "
                    "save the file as UTF-8",
                    code="D020",
                )

    def skip(self) -> str:
        """Move to the next character that is no white space, and give it ("" at the end)."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if self.fault or not self.more():
                return ""

    def line_at(self, at: int) -> str:
        """Name the line of a place; cheap where places are asked for in order."""
        if at >= self._mark:
            self._mark_line += self.text.count("\n", self._mark, at)
        else:
            self._mark_line -= self.text.count("\n", at, self._mark)
        self._mark = at
        return f"{self.name}:{self._mark_line}"

    def column_at(self, at: int) -> int:
        """Give the column of a place, from 1."""
        return at - self.text.rfind("\n", 0, at)

    def value(self) -> Any:
        """Decode the value that begins here."""
        while True:
            try:
                row, self.at = _DECODER.raw_decode(self.text, self.at)
                return row
            except json.JSONDecodeError as error:
                before = self.at
                at_end = len(self.text) - error.pos < _TAIL_CHARS or "Unterminated" in error.msg
                if at_end and self.fault is None and self.more():
                    continue
                if self.fault:
                    raise self.fault from error
                at = error.pos - (before - self.at)
                where = f"{self.line_at(at)}:{self.column_at(at)}"
                at_end = at >= len(self.text.rstrip())
                raise _broken(error.msg, where, at_end=at_end) from error
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.line_at(self.at)}: broken JSON: {error}", code="D033"
                ) from error


def _read_values(path: Path, name: str) -> Iterator[Item]:
    """Decode a JSON array element by element, or objects that stand one after the other.

    What follows a broken element is not read: where it begins cannot be told.
    """
    tape = _Tape(path, name)
    inside = tape.skip() == "["
    tape.at += inside
    try:
        first = True
        while mark := tape.skip():
            if inside and mark == "]":
                tape.at += 1
                if tape.skip():
                    raise _unexpected(tape, "nothing after the end of the array")
                return
            if inside and not first:
                if mark != ",":
                    raise _unexpected(tape, "',' or ']'")
                tape.at += 1
                tape.skip()
            first = False
            source = tape.line_at(tape.at)
            yield _mapping(tape.value(), source), source
        if tape.fault:
            raise tape.fault
        if inside:
            raise DataError(
                f"{tape.line_at(tape.at)}: JSON that breaks off: the array does not end",
                code="D031",
            )
    except DataError as error:
        yield error, tape.line_at(tape.at)


def _unexpected(tape: _Tape, wanted: str) -> DataError:
    where = f"{tape.line_at(tape.at)}:{tape.column_at(tape.at)}"
    return DataError(
        f"{where}: broken JSON: expected {wanted}, found {tape.text[tape.at : tape.at + 20]!r}",
        code="D030",
    )


class _Lines:
    """Give a csv reader its lines and remember what is wrong with them."""

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
    csv.field_size_limit(2**31 - 1)
    lines = _Lines(path, name)
    reader = csv.reader(iter(lines), delimiter=_separator(_head(path, name)), strict=True)
    header: list[str] | None = None
    line = 0
    try:
        for cells in reader:
            source, line = f"{name}:{line + 1}", reader.line_num
            for fault in lines.faults:
                yield fault, source
            lines.faults.clear()
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) < len(header):
                    message = f"{source}: a column name stands twice in {header}"
                    yield DataError(message, code="D036"), source
                    return
            elif len(cells) != len(header):
                message = f"{source}: {len(cells)} cells, but the header names {len(header)}"
                yield DataError(message, code="D035"), source
            else:
                yield dict(zip(header, cells, strict=True)), source
        for fault in lines.faults:
            yield fault, name
    except csv.Error as error:
        message = f"{name}:{line + 1}: broken table: {error}"
        yield DataError(message, code="D037"), f"{name}:{line + 1}"


def _separator(head: list[str]) -> str:
    """Choose the separator that cuts most rows of the head into as many cells as the first."""

    def fitness(separator: str) -> tuple[int, int]:
        try:
            rows = [row for row in csv.reader(head, delimiter=separator) if row]
        except csv.Error:
            return 0, 0
        width = len(rows[0]) if rows else 0
        return (sum(len(row) == width for row in rows), width) if width > 1 else (0, 0)

    return max(SEPARATORS, key=fitness)


def _read_parquet(path: Path, name: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = itertools.count(1)
            for batch in table.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    yield row, f"{name}:row {next(number)}"
    except (pyarrow.ArrowException, OSError) as error:
        yield DataError(f"{name}: broken parquet: {error}", code="D010"), name


def _read_arrow(path: Path, name: str) -> Iterator[Item]:
    import pyarrow
    import pyarrow.ipc

    number = itertools.count(1)
    try:
        with pyarrow.memory_map(str(path)) as source:
            if path.open("rb").read(6) == b"ARROW1":
                table = pyarrow.ipc.open_file(source)
                batches = map(table.get_batch, range(table.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(source))
            for batch in batches:
                for row in batch.to_pylist():
                    yield row, f"{name}:row {next(number)}"
    except (pyarrow.ArrowException, OSError) as error:
        yield DataError(f"{name}: broken arrow: {error}", code="D010"), name


def _read_text(path: Path, name: str) -> Iterator[Item]:
    """Cut plain text at ``<|endoftext|>`` alone on a line, or at blank lines without any mark."""
    pieces = (block for block, _ in blocks(path, name=name))
    marked = any(_END_MARK.encode() in piece for piece in pieces if isinstance(piece, bytes))
    document: list[str] = []
    start = 1
    for line, number in _text_lines(path, name):
        if isinstance(line, DataError):
            yield line, f"{name}:{number}"
            continue
        if line == _END_MARK if marked else not line.strip():
            yield from _document(document, start, name)
            document, start = [], number + 1
        else:
            document.append(line)
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
    "lines": _read_lines,
    "values": _read_values,
    "table": _read_table,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": _read_text,
}
