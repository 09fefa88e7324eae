"""Show an error with the line that it is about."""

import codecs
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from align.core.text import visible

PLACE = re.compile(r"(?P<file>[^\s:][^:]*):(?P<line>\d+):(?P<column>\d+): ")
MAX_SHOWN = 8
"""Errors whose line is shown; further ones have only their message."""
WIDTH = 100
SEVEN_BIT = "align_ascii"
"""ASCII under another name: click writes UTF-8 to a stream whose encoding is called ascii."""


def print_error(message: str) -> None:
    """Write an error with the lines that it is about, in color where the terminal has it."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    for line in with_source(message):
        color = "bright_red" if line.strip() == "^" else None if line.startswith("    ") else "red"
        typer.secho(line, fg=color, err=True, color=False if plain else None)


def fit_to_locale() -> None:
    """Make standard output and error write only what the locale can show.

    Python writes UTF-8 where the locale is C or POSIX. A locale that was set on purpose to another
    encoding gets ASCII with escapes; without any, UTF-8 is right almost everywhere.
    """
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_CTYPE", "LANG"))
    locale = next((name for name in names if name), "UTF-8")
    ascii_only = not re.search("utf-?8", locale, re.IGNORECASE)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = SEVEN_BIT if ascii_only else stream.encoding
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def _seven_bit(name: str) -> codecs.CodecInfo | None:
    """Return the codec of ASCII under a name of our own."""
    if name != SEVEN_BIT:
        return None
    ascii_codec = codecs.lookup("ascii")
    return codecs.CodecInfo(
        ascii_codec.encode,
        ascii_codec.decode,
        incrementalencoder=ascii_codec.incrementalencoder,
        incrementaldecoder=ascii_codec.incrementaldecoder,
        name=SEVEN_BIT,
    )


codecs.register(_seven_bit)


def with_source(message: str) -> Iterator[str]:
    """Yield the lines of an error message, each place followed by its line and a caret.

    A line is shown only if its file can still be read, and a long one around the column.
    """
    shown = 0
    for text in message.splitlines():
        yield visible(text)
        place = PLACE.match(text)
        if place is None or shown == MAX_SHOWN:
            continue
        line = _line(Path(place["file"]), int(place["line"]))
        if line is None:
            continue
        shown += 1
        column = int(place["column"]) - 1
        start = max(0, column - WIDTH // 2) if len(line) > WIDTH else 0
        yield f"    {visible(line[start : start + WIDTH].rstrip())}"
        yield f"    {' ' * (column - start)}^"


def _line(path: Path, number: int) -> str | None:
    """Return a line of a text file with tabs as single spaces, or None."""
    try:
        with path.open(encoding="utf-8") as f:
            found = next((text for i, text in enumerate(f, start=1) if i == number), None)
    except (OSError, UnicodeDecodeError):
        return None
    return None if found is None else found.replace("\t", " ").rstrip("\n")
