"""Logs of a stage: metrics.jsonl, samples.jsonl, one readable line per step, and sinks."""

import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from align.core.sinks import Tracking, open_sink, trl_name
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
ERROR = "error: "
"""What a log line of an error starts with, after the time and the rank."""
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
)
SILENT = ("bitsandbytes", "vllm")
"""Libraries that warn of optional parts that they do without; their errors are logged."""

log = logging.getLogger("align")


class _Formatter(logging.Formatter):
    """Log formatter that escapes control characters in text from models, data and templates."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line with its control characters escaped; an error is marked."""
        record.mark = ERROR if record.levelno >= logging.ERROR else ""
        return visible(super().format(record))


def setup_logging(rank: int) -> None:
    """Send log lines to standard error: rank 0 from INFO up, other ranks from WARNING up.

    Libraries that log much at INFO are limited to WARNING. Call this before importing them, because
    some read their level from the environment at import. A second call only changes level and rank,
    which srun's processes do not know at first.

    Args:
        rank: number of this process; rank 0 logs at INFO.
    """
    # vLLM warns of the settings that it is given here on purpose, some with a traceback.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Bars of libraries would fill the log; the terminal has its own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Libraries' notes to each other about what a later version removes.
    for module in ("torch", "transformers", "vllm", "deepspeed", "peft", "trl"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{module}(\.|$)")
    # TRL says at every import which versions of vLLM it was made for; only `use_vllm` needs them.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stderr))
    where = "" if rank == 0 else f"[rank {rank}] "
    for handler in log.handlers:
        handler.setFormatter(_Formatter(f"%(asctime)s {where}%(mark)s%(message)s", "%H:%M:%S"))
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in SILENT:
        logging.getLogger(name).setLevel(logging.ERROR)


class MetricsLog:
    """Append a stage's metrics and samples to its folder; only rank 0 writes.

    A new log overwrites its files unless ``rewind`` is called before the first line. A stage that
    resumes at a checkpoint keeps the lines up to it, and one that starts over keeps none.
    """

    def __init__(
        self,
        directory: Path,
        *,
        total_steps: int,
        sinks: Iterable[str] = (),
        tracking: Tracking | None = None,
        rank: int = 0,
    ) -> None:
        """Open the log.

        Args:
            directory: the stage's folder; its name and its parent's name identify the run in sinks.
            total_steps: optimizer or rollout steps of the whole stage, for the ETA.
            sinks: any of ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``, ``swanlab``.
            tracking: how the stage appears in the sinks.
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
        tracking = tracking or Tracking()
        named = sinks if self._writes else ()
        self._sinks = [open_sink(n, self._directory, tracking) for n in named]
        of_trl = partial(trl_name, kind=str(tracking.config.get("kind", "")))
        self._name: Callable[[str], str] = of_trl if tracking.names == "trl" else str

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
            sink.log(step, {self._name(name): value for name, value in numbers.items()})
        if sample is not None:
            self.sample(step, sample["prompt"], sample["completion"], score=sample.get("score"))

    def sample(
        self, step: int, prompt: str | Sequence[Any], completion: str, *, score: float | None
    ) -> None:
        """Write one sampled response to samples.jsonl."""
        if self._writes:
            row = {"step": step, "prompt": prompt, "completion": completion, "score": score}
            self._write(SAMPLES_FILE, row)
            for sink in self._sinks:
                sink.sample(row)

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
        # Only rows after the checkpoint go: those before it happened, and stay as they were.
        kept = _keep_until(self._directory / METRICS_FILE, step, lines)
        _keep_until(self._directory / SAMPLES_FILE, step, lines)
        _keep_until(self._directory / EVALUATIONS_FILE, step)
        raised = _keep_until(self._directory / ALARMS_FILE, step)
        self._alarms = {str(row.get("name")) for row in raised}
        if not kept and step:
            path = self._directory / METRICS_FILE
            log.warning("%s: its lines up to step %d are lost", path, step)
        # Time goes on from the last kept row, so that a resumed run does not start at 0 s again.
        self._kept_seconds = float(kept[-1].get("time_s", 0.0)) if kept else 0.0
        for sink in self._sinks:
            sink.rewind(step)
        last = kept[-1] if kept else {}
        return {k: math.nan if v is None else v for k, v in last.items() if "/" in k}

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
