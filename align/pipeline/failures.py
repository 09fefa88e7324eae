"""Find in the log of a failed stage what the stage itself said, each message once."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from align.core.log import ERROR

_STAMP = re.compile(r"\d\d:\d\d:\d\d (?:\[rank \d+\] )?(?P<text>.*)")
_FOREIGN = re.compile(r"\[\d{4}-\d\d-\d\d |\[rank\d+\]:|Traceback ")
"""Starts of lines that launchers and libraries write: they end a message."""
LOST = "another rank of this stage has ended"
MAX_LINES = 40
TAIL_BYTES = 64 * 1024


def ended_with_error(log: Path) -> bool:
    """Return whether the last line that a stage logged is an error; resumes append to the log."""
    with log.open("rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = f.read().decode("utf-8", "replace").splitlines()
    stamped = [found["text"] for line in lines if (found := _STAMP.match(line))]
    return bool(stamped) and stamped[-1].startswith(ERROR)


def last_messages(lines: Sequence[str]) -> list[str]:
    """Return the errors that a stage logged, as lines; several ranks often log the same one.

    Empty if it logged none: it was killed, or ended in a library.
    """
    found: list[list[str]] = []
    inside = False
    for line in lines:
        stamped = _STAMP.match(line)
        if stamped:
            text = stamped["text"]
            inside = text.startswith(ERROR)
            if inside:
                found.append([text.removeprefix(ERROR)])
        elif _FOREIGN.match(line):
            inside = False
        elif inside:
            found[-1].append(line)
    # Ranks that lost another one only repeat that it ended.
    causes = [block for block in found if LOST not in block[0]] or found[:1]
    unique = dict.fromkeys("\n".join(block).rstrip() for block in causes)
    return [line for block in unique for line in block.splitlines()][:MAX_LINES]
