"""Open data files by their content: compressed or not, text or table, or not data at all."""

import codecs
import gzip
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from align.core.errors import DataError
from align.data.reading.bounds import CODE, Unpacked, max_row, row_too_long
from align.data.reading.read_log import HashedFile

BLOCK_BYTES = 2**22
_HEAD_BYTES = 1024
_GZIP = b"\x1f\x8b"
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "packed by bzip2",
    b"\xfd7zXZ": "packed by xz",
    b"\x28\xb5\x2f\xfd": "packed by zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\x04\x22\x4d\x18": "packed by lz4",
}
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_LFS = b"version https://git-lfs"
_HTML = re.compile(rb"\s*(?:<!doctype html|<html\b)", re.IGNORECASE)


def content_of(path: Path, *, name: str) -> str:
    """Return the content type of a file, whatever its name: ``text``, ``parquet`` or ``arrow``.

    Raises:
        DataError: unreadable, or not data: a Git LFS pointer, a web page, an archive, UTF-16.
    """
    with _open(path, name=name) as stream:
        try:
            # The first bytes decide; names are often wrong (a .jsonl that is gzipped or a web
            # page).
            head = stream.read(_HEAD_BYTES)
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}", code="D003") from error
    if head.startswith(_GZIP):
        with gzip.open(path) as unpacked:
            try:
                head = unpacked.read(_HEAD_BYTES)
            except (OSError, EOFError, zlib.error):
                return "text"  # the reader reports it with the line number
        if head.startswith(tuple(_TABLES)):
            raise DataError(
                f"{name}: parquet or arrow inside gzip. Decompress it first.", code="D008"
            )
    else:
        for magic, what in _TABLES.items():
            if head.startswith(magic):
                return what
    _refuse(head, name)
    return "text"


def _open(path: Path, *, name: str) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        what = (
            f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else error
        )
        raise DataError(f"{name}: {what}", code="D002") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}", code="D003") from error


def _refuse(head: bytes, name: str) -> None:
    """Raise if the first bytes show that the file is not data."""
    if head.startswith(_LFS):
        raise DataError(
            f"{name}:1: a Git LFS pointer, not the data itself. Run 'git lfs pull'.",
            code="D006",
        )
    if _HTML.match(head.removeprefix(codecs.BOM_UTF8)):
        raise DataError(
            f"{name}:1: a web page, not data; the download saved an error or login page",
            code="D007",
        )
    for magic, what in _ARCHIVES.items():
        if head.startswith(magic):
            raise DataError(f"{name}: {what}. Decompress it first, or use gzip.", code="D008")
    wide = next((what for bom, what in _WIDE.items() if head.startswith(bom)), None)
    # UTF-16 without a mark: every second byte of Latin text is 0.
    if wide is None and head[1:200:2].count(0) > 0.4 * len(head[1:200:2]) > 2:
        wide = "UTF-16"
    if wide:
        raise DataError(f"{name}:1: {wide}, not UTF-8. Save the file as UTF-8.", code="D021")


def chunks(path: Path, *, name: str) -> Iterator[bytes | DataError]:
    """Yield the bytes of a file in pieces of a few MiB, decompressed and without a BOM.
    If a compressed file is truncated or unpacks to too much, the last item is the error, after all
    data before it.
    """
    with _open(path, name=name) as raw:
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        # The hash is of the file's own bytes, before they are unpacked.
        hashed = cast(Any, HashedFile(raw, path))
        stream = gzip.GzipFile(fileobj=hashed) if packed else hashed
        unpacked = Unpacked(path, name)
        first = True
        while True:
            try:
                piece = stream.read(BLOCK_BYTES)
                if packed:
                    unpacked.add(len(piece))
            except DataError as error:
                yield error
                return
            except (OSError, EOFError, zlib.error) as error:
                what = "broken gzip" if packed else "cannot be read"
                code = "D009" if packed else "D003"
                yield DataError(f"{name}: {what}: {error}", code=code)
                return
            if not piece:
                hashed.finish()
                return
            yield piece.removeprefix(codecs.BOM_UTF8) if first else piece
            first = False


def blocks(path: Path, *, name: str) -> Iterator[tuple[bytes | DataError, int]]:
    """Yield whole lines in blocks of a few MiB, each with the number of its first line."""
    line = 1
    rest: list[bytes] = []
    longest = max_row()
    for piece in chunks(path, name=name):
        if isinstance(piece, DataError):
            block = b"".join(rest)
            if block and piece.code != CODE:  # the limit cut the row, not its writer
                yield block, line
            yield piece, line + block.count(b"\n")
            return
        # Cut at the last line break; the rest joins the next piece.
        end = piece.rfind(b"\n") + 1
        if not end:
            rest.append(piece)
            if sum(map(len, rest)) > longest:
                yield row_too_long(f"{name}:{line}"), line
                return
            continue
        block = b"".join([*rest, piece[:end]])
        yield block, line
        line += block.count(b"\n")
        rest = [piece[end:]] if piece[end:] else []
    if rest:
        yield b"".join(rest), line


def decoded(block: bytes, first: int, *, name: str) -> Iterator[tuple[str | DataError, int]]:
    """Yield the lines of a block as text with their numbers; an invalid line becomes an error."""
    try:
        # Decode the whole block at once, and line by line only if that fails.
        text = block.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    if text is not None and "\0" not in text:
        # Not splitlines: U+2028 and similar are ordinary characters inside a JSON string.
        pieces = text.split("\n")
        last = pieces.pop()
        for number, piece in enumerate(pieces, start=first):
            yield piece + "\n", number
        if last:
            yield last, first + len(pieces)
        return
    for number, raw in enumerate(block.split(b"\n"), start=first):
        yield _line(raw, number, name=name), number


def _line(raw: bytes, number: int, *, name: str) -> str | DataError:
    if b"\0" in raw:
        column = raw.index(b"\0") + 1
        return DataError(f"{name}:{number}:{column}: a NUL byte; the file is damaged", code="D022")
    try:
        return raw.decode("utf-8") + "\n"
    except UnicodeDecodeError as error:
        return DataError(
            f"{name}:{number}: byte {raw[error.start]:#04x} is not UTF-8. Save the file as UTF-8.",
            code="D020",
        )
