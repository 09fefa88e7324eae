"""Show an error with the line that it is about."""

import codecs
import io
import os
import re
import sys

import typer

from align.core.caret import color_of, with_source

SEVEN_BIT = "align_ascii"
"""ASCII under another name: click writes UTF-8 to a stream whose encoding is called ascii."""


def print_error(message: str) -> None:
    """Write an error with the lines that it is about, in color where the terminal has it."""
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    for line in with_source(message):
        typer.secho(line, fg=color_of(line), err=True, color=False if plain else None)


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
