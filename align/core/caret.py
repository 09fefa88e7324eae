"""Show the line of a file that an error is about, with a caret below the column."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from align.core.text import visible

PLACE = re.compile(r"(?P<file>[^\s:][^:]*):(?P<line>\d+):(?P<column>\d+): ")
MAX_SHOWN = 8
"""Errors whose line is shown; further ones have only their message."""
WIDTH = 100


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


def without_places(lines: Sequence[str]) -> list[str]:
    """Return the indented lines of an error without places in files, and without their lines."""
    found: list[str] = []
    below = 0
    for i, line in enumerate(lines):
        text = line.lstrip()
        if below:
            below -= 1
            continue
        if match := PLACE.match(text):
            text = text[match.end() :]
            below = 2 if [x.strip() for x in lines[i + 2 : i + 3]] == ["^"] else 0
        found.append(line[: len(line) - len(line.lstrip())] + text)
    return found


def color_of(line: str) -> str | None:
    """Return the color of a line of ``with_source``; None for the line of the file."""
    if line.strip() == "^":
        return "bright_red"
    return None if line.startswith("    ") else "red"


def _line(path: Path, number: int) -> str | None:
    """Return a line of a text file with tabs as single spaces, or None."""
    try:
        with path.open(encoding="utf-8") as f:
            found = next((text for i, text in enumerate(f, start=1) if i == number), None)
    except (OSError, UnicodeDecodeError):
        return None
    return None if found is None else found.replace("\t", " ").rstrip("\n")
