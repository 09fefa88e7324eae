"""Read rows of JSON: one object per line, an array, or consecutive objects."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.data.reading.bounds import max_row, row_too_long
from align.data.reading.files import blocks, chunks, decoded

Row = dict[str, Any] | str
Item = tuple[Row | DataError, str]

MAX_DEPTH = 100
"""Limit of lists and objects inside of each other; code walks through rows by recursion."""
_TAIL_CHARS = 2**16
"""An error farther than this from the end of the buffer is not caused by the end of the buffer."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write null")


class _TwiceError(ValueError):
    """An object has a key twice."""


class _DeepError(ValueError):
    """Lists and objects are nested more than ``MAX_DEPTH`` deep."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A repeated key would silently lose a value.
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"key {twice!r} appears twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)
_SPACE = re.compile(r"[ \t\n\r]*")


def parse_lines(block: bytes, first: int, name: str) -> Iterator[Item]:
    """Yield the rows of a block of JSON Lines."""
    for line, number in decoded(block, first, name=name):
        source = f"{name}:{number}"
        if isinstance(line, DataError):
            yield line, source
        elif text := line.strip():
            yield _parse(text, line, source), source


def _parse(text: str, line: str, source: str) -> Row | DataError:
    try:
        row = _DECODER.decode(text)
        _refuse_deep(row, text, start=0, end=len(text))
        return _mapping(row, source)
    except json.JSONDecodeError as error:
        column = error.pos + 1 + len(line) - len(line.lstrip())
        message = error.msg + _advice(text, error.pos)
        return _broken(message, f"{source}:{column}", at_end=error.pos >= len(text))
    except (ValueError, RecursionError) as error:
        return _refused(error, source)


def _refuse_deep(row: Any, text: str, *, start: int, end: int) -> None:
    # Few rows have as many brackets.
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return
    level = [row]
    for _ in range(MAX_DEPTH):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
    if level:
        raise _DeepError


def _refused(error: Exception, where: str) -> DataError:
    # The decoder's own limit is above that of rows.
    if isinstance(error, _DeepError | RecursionError):
        told = f"{where}: lists and objects nested more than {MAX_DEPTH} deep"
        return DataError(told, code="D039")
    code = "D036" if isinstance(error, _TwiceError) else "D033"
    return DataError(f"{where}: broken JSON: {error}", code=code)


def _advice(line: str, at: int) -> str:
    """Return what is usual where a line of JSON Lines is broken at a character, or ""."""
    if line in ("{", "["):
        return "; rename the file to .json if its objects span several lines"
    if line[at : at + 1] == "'":
        return "; Python's quotes: write the rows with json.dumps"
    return "; one object per line, without a comma after it" if line[at:].strip() == "," else ""


def _broken(message: str, where: str, *, at_end: bool) -> DataError:
    cut = at_end or message.startswith("Unterminated")
    what = "truncated JSON" if cut else "broken JSON"
    return DataError(f"{where}: {what}: {message}", code="D031" if cut else "D030")


def _mapping(row: object, source: str) -> Row | DataError:
    if isinstance(row, dict):
        return row
    return DataError(
        f"{source}: expected an object with named fields, found {str(row)[:60]!r}", code="D032"
    )


def read_lines(path: Path, name: str) -> Iterator[Item]:
    """Yield the rows of a JSON Lines file."""
    for block, first in blocks(path, name=name):
        if isinstance(block, DataError):
            yield block, f"{name}:{first}"
        else:
            yield from parse_lines(block, first, name)


class _Tape:
    """A sliding window over a JSON text that tracks line numbers."""

    def __init__(self, path: Path, name: str) -> None:
        self._pieces = chunks(path, name=name)
        self.name, self.text, self.at = name, "", 0
        self._undecoded = b""
        self._mark, self._mark_line = 0, 1
        self._cut = 0
        """Characters of the first line in the buffer that were dropped."""
        self.fault: DataError | None = None

    def more(self) -> bool:
        """Drop the text already read and read as much again as remains; return False at the end."""
        self.line_at(self.at)
        self._cut = self.column_at(self.at) - 1
        self._mark = 0
        self.text, self.at = self.text[self.at :], 0
        if len(self.text) > max_row():
            self.fault = row_too_long(self.line_at(0))
        # Doubling the buffer keeps decoding of a large value linear in its length.
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
            # Up to three bytes may be the beginning of a character that the next piece completes.
            if final or len(self._undecoded) > 3:
                self.fault = DataError(
                    f"{self.line_at(len(self.text))}: byte {raw[error.start]:#04x} is not UTF-8; "
                    "save the file as UTF-8",
                    code="D020",
                )

    def skip(self) -> str:
        """Move to the next character that is not white space and return it ("" at the end)."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if self.fault or not self.more():
                return ""

    def line_at(self, at: int) -> str:
        """Return the place ``file:line`` of a position; fast for positions in order."""
        if at >= self._mark:
            self._mark_line += self.text.count("\n", self._mark, at)
        else:
            self._mark_line -= self.text.count("\n", at, self._mark)
        self._mark = at
        return f"{self.name}:{self._mark_line}"

    def column_at(self, at: int) -> int:
        """Return the column of a position, from 1."""
        start = self.text.rfind("\n", 0, at)
        return at - start if start >= 0 else at + 1 + self._cut

    def value(self) -> Any:
        """Return the decoded value that begins at the current position."""
        while True:
            try:
                row, end = _DECODER.raw_decode(self.text, self.at)
                _refuse_deep(row, self.text, start=self.at, end=end)
                self.at = end
                return row
            except json.JSONDecodeError as error:
                before = self.at
                # An error near the end of the buffer may vanish with more text; elsewhere it is
                # real.
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
                raise _refused(error, self.line_at(self.at)) from error


def read_values(path: Path, name: str) -> Iterator[Item]:
    """Decode a JSON array element by element, or consecutive objects.

    Nothing after a broken element is read, because the start of the next element is unknown.
    """
    tape = _Tape(path, name)
    # Without a bracket, the file is a sequence of objects.
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
                f"{tape.line_at(tape.at)}: truncated JSON: the array does not end",
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
