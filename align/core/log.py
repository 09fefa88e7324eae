"""Logs of a stage: metrics.jsonl, samples.jsonl, one readable line per step, and sinks."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from align.core.errors import RecipeError
from align.core.text import visible
from align.core.types import Alarm

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
CARDS_FILE = "cards.json"
"""Cards of the reward models, written by an evaluate stage."""
EVALUATIONS_FILE = "evaluations.jsonl"
ALARMS_FILE = "alarms.jsonl"
"""Alarms of a stage, each name once: ``step``, ``name``, ``reason``, ``remedy``."""
FILES = (SAMPLES_FILE, EVALUATIONS_FILE, ALARMS_FILE, METRICS_FILE)
HEADLINE = (
    "train/loss",
    "eval/loss",
    "train/accuracy",
    "eval/accuracy",
    "reward/mean",
    "kl/reference",
    "policy/clip_frac",
    "value/explained_variance",
    "length/mean",
    "optim/learning_rate",
    "tokens/per_s",
)
"""Metrics of the readable line, in this order; the file contains all of them."""
LINE_METRICS = 7
QUIET = (
    "DeepSpeed",
    "accelerate",
    "asyncio",
    "datasets",
    "filelock",
    "fsspec",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "matplotlib",
    "numba",
    "torch.distributed",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "urllib3",
    "vllm",
)

log = logging.getLogger("align")


class _Formatter(logging.Formatter):
    """Log formatter that escapes control characters in text from models, data and templates."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line with its control characters escaped."""
        return visible(super().format(record))


def setup_logging(rank: int) -> None:
    """Send log lines to standard error: rank 0 from INFO up, other ranks from WARNING up.

    Libraries that log much at INFO are limited to WARNING. Call this before importing them, because
    some read their level from the environment at import. A second call only changes the level.

    Args:
        rank: number of this process; rank 0 logs at INFO.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        where = "" if rank == 0 else f"[rank {rank}] "
        handler.setFormatter(_Formatter(f"%(asctime)s {where}%(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


class Sink(Protocol):
    """A further target for metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        ...

    def rewind(self, step: int) -> None:
        """Remove everything after a step, as far as the target supports it."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class MetricsLog:
    """Append a stage's metrics and samples to its folder; only rank 0 writes.

    A new log overwrites its files unless ``rewind`` is called before the first line. A stage that
    resumes at a checkpoint keeps the lines up to it, and one that starts over keeps none.
    """

    def __init__(
        self, directory: Path, *, total_steps: int, sinks: Iterable[str] = (), rank: int = 0
    ) -> None:
        """Open the log.

        Args:
            directory: the stage's folder; its name and its parent's name identify the run in sinks.
            total_steps: optimizer or rollout steps of the whole stage, for the ETA.
            sinks: any of ``tensorboard``, ``wandb``, ``trackio``.
            rank: number of this process; only rank 0 writes.

        Raises:
            RecipeError: a sink is unknown or its package is not installed.
        """
        self._directory = Path(directory)
        self._total_steps = total_steps
        self._writes = rank == 0
        self._files: dict[str, TextIO] = {}
        self._alarms: set[str] = set()
        self._kept_seconds = 0.0
        self._first_step: int | None = None
        self._began = time.monotonic()
        self._resumed = False
        self._sinks = [open_sink(n, self._directory) for n in sinks] if self._writes else []

    def log(
        self, step: int, metrics: Mapping[str, float], *, sample: Mapping[str, Any] | None = None
    ) -> None:
        """Write one line of metrics and one readable line.

        Args:
            step: steps completed so far; several lines may have the same step.
            metrics: ``group/name`` to number; a non-finite number is written as null.
            sample: ``prompt``, ``completion`` and ``score``, also written to samples.jsonl.
        """
        if not self._writes:
            return
        elapsed = time.monotonic() - self._began
        # JSON has no NaN: strict readers would reject the whole file.
        numbers = {name: float(value) for name, value in metrics.items()}
        line = {
            "step": step,
            "time_s": round(self._kept_seconds + elapsed, 3),
            "total_steps": self._total_steps,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        }
        self._write(METRICS_FILE, line)
        if self._first_step is None:
            # The line of step 0 is an evaluation before the first step.
            self._first_step = max(step - 1, 0)
        # The ETA uses only this attempt, whose speed may differ from earlier ones.
        rate = elapsed / max(step - self._first_step, 1)
        left = rate * max(self._total_steps - step, 0)
        log.info(
            "%s",
            human_line(
                self._directory.name, numbers, step=step, total_steps=self._total_steps, left_s=left
            ),
        )
        for sink in self._sinks:
            sink.log(step, numbers)
        if sample is not None:
            self.sample(step, sample["prompt"], sample["completion"], score=sample.get("score"))

    def sample(
        self, step: int, prompt: str | Sequence[Any], completion: str, *, score: float | None
    ) -> None:
        """Write one sampled response to samples.jsonl."""
        if self._writes:
            row = {"step": step, "prompt": prompt, "completion": completion, "score": score}
            self._write(SAMPLES_FILE, row)

    def evaluation(self, step: int, found: Mapping[str, Any]) -> None:
        """Write the result of an evaluation during training to evaluations.jsonl."""
        if self._writes:
            self._write(EVALUATIONS_FILE, {"step": step, **found})

    def alarm(self, step: int, alarm: Alarm) -> None:
        """Write an alarm to alarms.jsonl and the log, unless one of its name was written before."""
        if self._writes and alarm.name not in self._alarms:
            self._alarms.add(alarm.name)
            self._write(ALARMS_FILE, {"step": step, **alarm._asdict()})
            log.warning("step %d: %s: %s; %s", step, *alarm)

    def rewind(self, step: int, *, lines: int | None = None) -> dict[str, float]:
        """Drop the lines after ``step``, so that resuming from there repeats nothing.

        A last line that a killed process left incomplete is dropped too.

        Args:
            step: the step after which the checkpoint was saved.
            lines: number of lines written by then, where several lines have the same step.

        Returns:
            The metrics of the last kept line; empty on ranks that do not write.
        """
        if not self._writes:
            return {}
        self._close_files()
        self._resumed = True
        self._first_step = step
        self._began = time.monotonic()
        kept = _keep_until(self._directory / METRICS_FILE, step, lines)
        _keep_until(self._directory / SAMPLES_FILE, step, lines)
        _keep_until(self._directory / EVALUATIONS_FILE, step)
        raised = _keep_until(self._directory / ALARMS_FILE, step)
        self._alarms = {str(row.get("name")) for row in raised}
        if not kept and step:
            path = self._directory / METRICS_FILE
            log.warning("%s: its lines up to step %d are lost", path, step)
        self._kept_seconds = float(kept[-1].get("time_s", 0.0)) if kept else 0.0
        for sink in self._sinks:
            sink.rewind(step)
        return {k: v for k, v in (kept[-1] if kept else {}).items() if "/" in k}

    def close(self) -> None:
        """Close the files and the sinks; a second call does nothing."""
        self._close_files()
        while self._sinks:
            self._sinks.pop().close()

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        if name not in self._files:
            if not self._files and not self._resumed:
                # Remove the lines of an earlier attempt only when this one has something to write.
                for file in FILES:
                    (self._directory / file).unlink(missing_ok=True)
            self._directory.mkdir(parents=True, exist_ok=True)
            # Line buffered: a killed process loses at most the line that it was writing.
            path = self._directory / name
            self._files[name] = path.open("a", encoding="utf-8", buffering=1)
        self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")

    def _close_files(self) -> None:
        self._resumed = self._resumed or bool(self._files)
        for file in self._files.values():
            file.close()
        self._files.clear()


def human_line(
    stage: str, metrics: Mapping[str, float], *, step: int, total_steps: int, left_s: float
) -> str:
    """Return one step as one line: stage, step, its main metrics and the time left."""
    names = [name for name in HEADLINE if name in metrics]
    names += [name for name in metrics if name not in HEADLINE]
    said = [f"{name} {short_number(metrics[name])}" for name in names[:LINE_METRICS]]
    minutes, seconds = divmod(round(left_s), 60)
    return "  ".join([f"{stage} {step}/{total_steps}", *said, f"eta {minutes}:{seconds:02d}"])


def short_number(value: float) -> str:
    """Return a number with about four significant digits: 1234, 0.4321, 2.5e-05."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"


def _keep_until(path: Path, step: int, lines: int | None = None) -> list[dict[str, Any]]:
    """Drop the lines after a step and damaged ones; return the rows that are kept."""
    if not path.is_file():
        return []
    kept, damaged = [], 0
    # As bytes: str.splitlines also splits at characters that a completion may contain (U+2028).
    for line in path.read_bytes().splitlines(keepends=True):
        row = _row(line) if line.endswith(b"\n") else None
        if row is None:
            damaged += line.endswith(b"\n")
        elif row["step"] <= step:
            kept.append((line, row))
    if damaged:
        log.warning("%s: %d damaged lines are dropped", path, damaged)
    kept = kept[:lines]
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("wb") as f:
        f.write(b"".join(line for line, _ in kept))
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    return [row for _, row in kept]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if whole and isinstance(row.get("time_s", 0.0), int | float) else None


def open_sink(name: str, directory: Path) -> Sink:
    """Open a sink by name for a stage's folder.

    Raises:
        RecipeError: the name is unknown or the package is not installed.
    """
    try:
        if name == "tensorboard":
            return TensorboardSink(directory)
        if name == "wandb":
            return _wandb(directory)
        if name == "trackio":
            return _trackio(directory)
    except ImportError as e:
        raise RecipeError(
            f"sinks.{name}: true, but the package '{name}' cannot be imported ({e}). "
            f"Run 'pip install {name}' or set sinks.{name}: false."
        ) from e
    raise RecipeError(f"sinks: unknown sink '{name}'; expected tensorboard, wandb or trackio")


class TensorboardSink:
    """Write metrics to event files under ``tensorboard/`` in the stage's folder."""

    def __init__(self, directory: Path) -> None:
        # Names in protobuf modules are created at import, invisible to a type checker.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        events, summaries = vars(event_pb2), vars(summary_pb2)
        self._event, self._session = events["Event"], events["SessionLog"]
        self._summary = summaries["Summary"]
        self._writer = EventFileWriter(str(directory / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        values = [self._summary.Value(tag=n, simple_value=v) for n, v in metrics.items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))

    def rewind(self, step: int) -> None:
        """Make TensorBoard hide what earlier processes wrote after this step."""
        start = self._session(status=self._session.START)
        event = self._event(step=step + 1, wall_time=time.time(), session_log=start)
        self._writer.add_event(event)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class RunSink:
    """Write metrics to an open W&B or trackio run; a rewind repeats steps there."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def rewind(self, step: int) -> None:
        """Do nothing: both keep what was sent."""

    def close(self) -> None:
        """Flush and close."""
        self._run.finish()


def _wandb(directory: Path) -> Sink:
    import wandb  # pyright: ignore[reportMissingImports]  (an extra)

    project, name = _run_names(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return RunSink(wandb.init(project=project, name=name, dir=str(directory)))


def _trackio(directory: Path) -> Sink:
    import trackio  # pyright: ignore[reportMissingImports]  (an extra)

    project, name = _run_names(directory)
    return RunSink(trackio.init(project=project, name=name, resume="allow", embed=False))


def _run_names(directory: Path) -> tuple[str, str]:
    path = directory.resolve()
    return path.parent.name or "align", path.name
