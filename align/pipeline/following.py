"""Read the files that a stage writes: while it runs, and its log after it has failed."""

import json
import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from align.core.artifacts import read_json_object
from align.core.card import CARD_FILE, read_card
from align.core.log import ALARMS_FILE, ERROR, METRICS_FILE, SAMPLES_FILE
from align.core.text import visible

LOG_LINE = re.compile(rb"\d\d:\d\d:\d\d (?!\[rank)(.+)")
"""Matches the readable lines of align.core.log: rank 0's time and text."""
_DETAIL = re.compile(r"\s|\S+ \d+/\d+  |step \d+: |error: ")
"""Log lines that are not phases: of the preflight card, of a step, an alarm or an error."""
_STAMP = re.compile(r"\d\d:\d\d:\d\d (?:\[rank \d+\] )?(?P<text>.*)")
_FOREIGN = re.compile(r"\[\d{4}-\d\d-\d\d |\[rank\d+\]:|Traceback ")
"""Starts of lines that launchers and libraries write: they end a message."""
_ATTEMPT = re.compile(r"\d\d:\d\d:\d\d starting \d+ process(?:es)?$")
"""The first line of an attempt, which ``begin_log`` writes."""
LOST = "another rank of this stage has ended"
MAX_LINES = 40
TAIL_BYTES = 64 * 1024
"""Bytes at the end of a log or metrics file that are read to tell its last lines."""
RECENT = 16
"""Steps over which the tokens per second are averaged."""


class Tail:
    """Read the complete lines that were appended to a file since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.is_file() else 0

    def rows(self) -> list[dict[str, Any]]:
        """Return the new rows of a JSON Lines file."""
        return [row for line in self.lines() if (row := _row(line)) is not None]

    def lines(self) -> list[bytes]:
        """Return the new lines; a file truncated by a resume is followed from its new end."""
        if not self._path.is_file():
            return []
        size = self._path.stat().st_size
        if size <= self._offset:
            self._offset = size
            return []
        with self._path.open("rb") as f:
            f.seek(self._offset)
            block = f.read()
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


def tail_lines(path: Path) -> list[bytes]:
    """Return the lines at the end of a file, [] for a missing file.

    The last one is empty, unless its line break is still to be written.
    """
    try:
        with path.open("rb") as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - TAIL_BYTES))
            return f.read().split(b"\n")[1 if size > TAIL_BYTES else 0 :]
    except OSError:
        return []


def _row(line: bytes) -> dict[str, Any] | None:
    # A resume may leave the offset inside a line; that line is not shown.
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class Followed:
    """A running stage as its files show it.

    Attributes:
        first: first row of this attempt's metrics, None before it.
        last: newest value of every metric.
        sample: newest sampled response, None before the first.
        phase: newest line of the log that is not a detail; empty before it.
    """

    def __init__(self, folder: Path) -> None:
        files = (METRICS_FILE, SAMPLES_FILE, "log.txt", ALARMS_FILE)
        self._metrics, self._samples, self._log, self._alarms = (Tail(folder / x) for x in files)
        # The card of the attempt before stays until this one has its own.
        self._card: Path | None = folder / CARD_FILE
        self._card_before = _changed(folder / CARD_FILE)
        self._rates: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] = {}
        self.sample: dict[str, Any] | None = None
        self.phase = ""

    def read(self) -> list[str]:
        """Read what is new; return the new warnings and alarms, and what to do about each."""
        for row in self._metrics.rows():
            self._keep_rate(row)
            self.first = self.first or row
            self.last |= row
        for row in self._samples.rows():
            self.sample = row
        for line in self._log.lines():
            found = LOG_LINE.match(line)
            text = visible(found[1].decode("utf-8", "replace")) if found else ""
            if text and not _DETAIL.match(text):
                self.phase = text
        news = self._card_warnings()
        for row in self._alarms.rows():
            news += alarm_lines(row)
        return news

    def tokens_per_s(self) -> float | None:
        """Return the tokens per second of the last steps, weighted by their time."""
        seconds = sum(s for _, s in self._rates)
        return sum(rate * s for rate, s in self._rates) / seconds if seconds else None

    def steps(self) -> tuple[int, int]:
        """Return the steps done and those of the whole stage; 0 where unknown."""
        return _int(self.last.get("step")), _int(self.last.get("total_steps"))

    def left_s(self) -> float | None:
        """Return the seconds left at the pace of this attempt, None before its first step."""
        return eta_s(self.first, self.last)

    def _keep_rate(self, row: Mapping[str, Any]) -> None:
        rate, now = row.get("tokens/per_s"), row.get("time_s")
        if isinstance(rate, int | float) and isinstance(now, int | float):
            # The time of a resumed stage includes that of the attempts before.
            start = 0.0 if _int(row.get("step")) <= 1 else now
            self._rates.append((rate, max(now - self.last.get("time_s", start), 1e-3)))

    def _card_warnings(self) -> list[str]:
        """Return the warnings of the stage's preflight, once."""
        if self._card is None or _changed(self._card) in (None, self._card_before):
            return []
        try:
            card = read_card(read_json_object(self._card) or {})
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged since it was written
            return []
        self._card = None
        found = []
        for line in card.lines:
            if line.verdict == "warn":
                found.append(f"warning: {line.name}: {line.value} ({line.bound})")
                found.append(f"    -> {line.remedy}")
        return found


def alarm_lines(row: Mapping[str, Any]) -> list[str]:
    """Return an alarm of a stage as two lines: what was noticed, and what to do."""
    step, name, reason, remedy = (row.get(k) for k in ("step", "name", "reason", "remedy"))
    return [f"alarm at step {step}: {name}: {reason}", f"    -> {remedy}"]


def eta_s(first: Mapping[str, Any] | None, last: Mapping[str, Any]) -> float | None:
    """Return the estimated seconds left, from the first and last rows of this attempt."""
    total, step = last.get("total_steps"), last.get("step")
    if not first or not total or not step or "time_s" not in last:
        return None
    steps = step - first["step"]
    spent = last["time_s"] - first["time_s"]
    # With only one row so far, use the average since the start.
    if steps <= 0:
        steps, spent = step, last["time_s"]
    return max(0.0, (total - step) * spent / steps)


def last_end(stage: Path, locks: Sequence[bool | None]) -> Literal["killed", "failed", "stopped"]:
    """Return how the last attempt at a stage ended that is not done and that nothing runs now.

    Args:
        stage: its folder.
        locks: of the stage and its run, as ``is_held`` returns them.
    """
    # A process that ends by itself removes its locks, whatever it ends with.
    if False in locks:
        return "killed"
    return "failed" if last_error(stage) else "stopped"


def begin_log(log: Path, ranks: int) -> None:
    """Append the first line of an attempt at a stage to its log."""
    _append(log, f"starting {ranks} process{'es'[: 2 * (ranks != 1)]}")


def end_log(log: Path, reason: str) -> None:
    """Append how a stage ended that could not log it itself."""
    _append(log, f"{ERROR}the stage ended without a message: {reason}")


def _append(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as f:
        f.write(f"{datetime.now():%H:%M:%S} {text}\n")


def last_error(stage: Path) -> str:
    """Return the errors of the last attempt at a stage; empty if it logged none.

    Resumes append to the log, so errors before the attempt's first line are not of this one. In a
    log without such a line only the last record counts.
    """
    lines = b"\n".join(tail_lines(stage / "log.txt")).decode("utf-8", "replace").splitlines()
    begun = [i for i, line in enumerate(lines) if _ATTEMPT.match(line)]
    starts = begun or [i for i, line in enumerate(lines) if _STAMP.match(line)]
    return "\n".join(last_messages(lines[starts[-1] :])) if starts else ""


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


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def _int(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0
