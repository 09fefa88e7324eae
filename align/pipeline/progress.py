"""The line of a running stage: a bar and as many facts as fit, most important first."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, cast

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from align.core.text import visible

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
MIN_BAR, GAP = 8, 2
"""Columns of the narrowest bar, and between two columns of the line."""
PLAIN_SAMPLE = 140
"""Columns of a sampled response where the width is unknown."""


class _LastingStream:
    """A standard output whose loss does not end a run; what is written then goes nowhere.

    That is a pipe that nobody reads, a terminal that was closed, or a file on a full disk. The logs
    of the stages contain what matters.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        # The stream keeps what it could not write, and would fail again at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def make_console(*, quiet: bool = False) -> Console:
    """Return the console of a run; where no cursor can move, it writes plain lines.

    That is in a notebook, whose output calls itself a terminal, in a file or pipe, even with
    FORCE_COLOR, and in a terminal that calls itself dumb.
    """
    notebook = type(sys.stdout).__module__.startswith("ipykernel")
    moves = not notebook and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", None)
    lasting = cast("TextIO", _LastingStream(sys.stdout))
    return Console(
        file=None if notebook else lasting,
        highlight=False,
        soft_wrap=True,
        force_jupyter=False,
        force_terminal=False if notebook else None,
        force_interactive=moves,
        quiet=quiet,
    )


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a running stage; None or empty is left out.

    Attributes:
        title: place and name of the stage.
        step, total: optimizer steps done, and of the whole stage; 0 where unknown.
        phase: what the stage does before its first step and after its last; else empty.
        left_s: seconds left of the stage.
        tokens_per_s: averaged over the last steps.
        metrics: newest values, of which the most important are shown.
        memory: such as ``1.9 GiB``.
        elapsed_s: seconds since the stage started.
    """

    title: str
    step: int = 0
    total: int = 0
    phase: str = ""
    left_s: float | None = None
    tokens_per_s: float | None = None
    metrics: Mapping[str, Any] | None = None
    memory: str = ""
    elapsed_s: float | None = None

    def columns(self) -> list[str]:
        """Return the texts of the line, most important first."""
        if self.phase:
            found = [self.phase, clock(self.elapsed_s) if self.elapsed_s is not None else ""]
            return [text for text in [*found, self.memory] if text]
        found = [f"step {self.step:,}/{self.total:,}" if self.total else f"step {self.step:,}"]
        if self.left_s is not None:
            found.append(f"{clock(self.left_s)} left")
        if self.tokens_per_s is not None:
            found.append(f"{self.tokens_per_s:,.0f} tokens/s")
        numbers = metric_texts(self.metrics or {})
        return found + [text for text in [*numbers[:1], self.memory, *numbers[1:]] if text]

    def text(self) -> str:
        """Return the columns as one plain line."""
        return ", ".join(self.columns())


class ProgressLine:
    """The facts as one line of the terminal's width: the bar takes what the columns leave."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        """Yield the line."""
        facts, width = self._facts, options.max_width
        title, columns = fitting(facts.title, facts.columns(), width=width)
        used = sum(cell_len(text) + GAP for text in [title, *columns])
        if width - used < MIN_BAR:
            yield Text("  ".join([title, *columns]), no_wrap=True, overflow="crop")
            return
        known = bool(facts.total) and not facts.phase
        bar = ProgressBar(
            total=facts.total if known else None,
            completed=facts.step if known else 0,
            width=width - used,
            pulse=not known,
        )
        grid = Table.grid(padding=(0, GAP, 0, 0))
        for _ in range(2 + len(columns)):
            grid.add_column(no_wrap=True)
        grid.add_row(Text(title, style="bold"), bar, *map(Text, columns))
        yield grid


def fitting(title: str, columns: Sequence[str], *, width: int) -> tuple[str, list[str]]:
    """Return the title and the first columns that fit, both cut if they must be.

    The first two columns are worth more than the bar, the others are not.
    """
    title = _cut(title, max(width // 2, width - GAP - cell_len("".join(columns[:1]))))
    left = width - cell_len(title)
    kept: list[str] = []
    for i, text in enumerate(columns):
        bar = GAP + MIN_BAR if i > 1 else 0
        if cell_len(text) + GAP + bar > left:
            break
        kept.append(text)
        left -= cell_len(text) + GAP
    if not kept and columns:
        kept = [_cut(columns[0], max(left - GAP, 0))]
    return title, kept


def _cut(text: str, width: int) -> str:
    """Return text of at most ``width`` columns; dots stand for what is missing."""
    return (
        text if cell_len(text) <= width else set_cell_size(text, max(width - 3, 0)) + "..."[:width]
    )


def metric_texts(row: Mapping[str, Any]) -> list[str]:
    """Return the three most important metrics of a row, each as name and value."""
    present = [name for name in SHOWN if isinstance(row.get(name), int | float)]
    return [f"{name} {number(row[name])}" for name in present[:3]]


def metric_text(row: Mapping[str, Any]) -> str:
    """Return the three most important metrics of a row."""
    return ", ".join(metric_texts(row))


def change_text(row: Mapping[str, Any]) -> str:
    """Return how the most important held-out metric of a row changed since step 0."""
    for name in CHANGED:
        value, low, high = (row.get(f"change/{name}{end}") for end in ("", "_low", "_high"))
        if isinstance(value, int | float):
            bounds = "" if low is None else f" [{number(low)}, {number(high)}]"
            return f"eval/{name} changed by {number(value)}{bounds} since step 0"
    return ""


def sample_text(sample: Mapping[str, Any], *, width: int = PLAIN_SAMPLE) -> str:
    """Return a sample as one line: the end of the prompt, the response, the score."""
    prompt, completion = _plain(sample.get("prompt", "")), _plain(sample.get("completion", ""))
    score = sample.get("score")
    tail = f"  [{number(score)}]" if isinstance(score, int | float) else ""
    left = max(width - len(" -> ") - len(tail), 8)
    # The response is what changes; the prompt gets what it leaves, and at least 3 of 7 columns.
    asked = min(len(prompt), max(left * 3 // 7, left - len(completion)))
    return visible(f"{prompt[len(prompt) - asked :]} -> {completion[: left - asked]}{tail}")


def _plain(value: object) -> str:
    """Return a prompt or response as one line; of a conversation, the text of its last message."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value", value.get("text", "")))
    if isinstance(value, list):  # the parts of a message
        value = " ".join(_plain(part) for part in value)
    return " ".join(str("" if value is None else value).split())


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
