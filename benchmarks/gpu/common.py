"""Shared by the GPU checks: results, timers, Qwen2.5-shaped models and a runner for stages.

``ALIGN_SMOKE=1`` runs every check on the CPU with tiny sizes, to test the checks themselves.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from align.core import distributed
from align.core.artifacts import Artifact
from align.stages import base
from benchmarks.workloads import SHAPES, write_tokenizer

SMOKE = os.environ.get("ALIGN_SMOKE") == "1"
WORK = Path(os.environ.get("WORK", "/tmp/align_gpu"))
DEVICE = torch.device("cpu" if SMOKE else "cuda")
DENSE_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Data-sheet rate of dense bf16 matrix products (SXM cards); the denominator of MFU."""


def result(**facts: Any) -> None:
    """Print measured values on a line that the driver script copies into its table."""
    text = " ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in facts.items()
    )
    sys.stdout.write(f"RESULT {text}\n")
    sys.stdout.flush()


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Start a new measurement of peak memory."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Return the peak of allocated GPU memory in GiB, 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0


def milliseconds(run: Callable[[], Any], *, rounds: int = 5) -> float:
    """Return the mean duration of ``run`` after one warm-up call."""
    run()
    synchronize()
    began = time.perf_counter()
    for _ in range(rounds):
        run()
    synchronize()
    return (time.perf_counter() - began) / rounds * 1e3


def failure(error: BaseException) -> str:
    """Return an exception as one word for the table."""
    text = " ".join(str(error).split())[:160]
    return f"FAILED:{type(error).__name__}:{text.replace(' ', '_')}"


def model_utilization(flops_per_second: float) -> float:
    """Return the fraction of the card's data-sheet rate, NaN for an unknown card."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    peaks = [peak for card, peak in DENSE_BF16_FLOPS.items() if card in name]
    return flops_per_second / peaks[0] if peaks else float("nan")


def make_run(shape: str) -> Path:
    """Write a model with random bf16 weights once; return the run folder with its stage 'base'."""
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

    folder = WORK / f"run-{shape}"
    model_dir = folder / "base" / "model"
    if (model_dir / "config.json").exists():
        return folder
    settings = {name: getattr(SHAPES[shape], name) for name in SHAPES[shape].__slots__}
    config = Qwen2Config(
        **settings,
        max_position_embeddings=32768,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    model.save_pretrained(model_dir)
    write_tokenizer(model_dir, settings["vocab_size"])
    return folder


def training_flops(shape: str, lengths: list[int], num_trained: int) -> float:
    """Return the model FLOPs of a forward and a backward pass.

    Args:
        shape: name of a shape of ``benchmarks.workloads``.
        lengths: tokens of each sequence, causal attention within it.
        num_trained: positions that go through the head.
    """
    s = SHAPES[shape]
    head_size = s.hidden_size // s.num_attention_heads
    projections = 2 * s.num_attention_heads + 2 * s.num_key_value_heads
    layer = s.hidden_size * (2 * head_size * projections + 6 * s.intermediate_size)
    attention = 2 * s.num_attention_heads * head_size
    body = sum(s.num_hidden_layers * (n * layer + n * n * attention) for n in lengths)
    return 3.0 * (body + 2 * num_trained * s.hidden_size * s.vocab_size)


class EnoughRounds(Exception):
    """Raised to end a stage once its steps are measured."""


class StepTimer:
    """Stand in for a stage's metrics log: time each step and end the stage after ``rounds``."""

    def __init__(self, rounds: int, *, profiled: bool = False) -> None:
        self.seconds: list[float] = []
        self.rows: list[dict[str, float]] = []
        self._rounds, self._last = rounds, 0.0
        self._profiler = torch.profiler.profile() if profiled else None

    def log(self, step: int, metrics: Mapping[str, float], *, sample: Any = None) -> None:
        """Record a step."""
        synchronize()
        now = time.perf_counter()
        if self.rows:
            self.seconds.append(now - self._last)
        self._last = now
        self.rows.append(dict(metrics))
        rounded = {name: round(value, 5) for name, value in metrics.items()}
        sys.stdout.write(f"step {step} {rounded}\n")
        if len(self.rows) >= self._rounds:
            self._print_profile()
            raise EnoughRounds
        if self._profiler is not None and len(self.rows) == self._rounds - 1:
            self._profiler.start()

    def _print_profile(self) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        self.seconds.pop()  # slowed down by the profiler
        for column in ("self_cuda_time_total", "self_cpu_time_total"):
            table = self._profiler.key_averages().table(sort_by=column, row_limit=20)
            sys.stdout.write(f"{table}\n")

    def rewind(self, step: int) -> dict[str, float]:
        """Return no earlier metrics."""
        return {}

    def evaluation(self, *args: Any, **kwargs: Any) -> None:
        """Ignore held-out results."""

    def close(self) -> None:
        """Do nothing."""


def run_stage(
    kind: str, spec: Any, run_dir: Path, *, rounds: int, profiled: bool = False
) -> tuple[StepTimer, float]:
    """Run a stage's own code for a few steps; ``profiled`` prints where the last one went.

    Returns:
        The timer and the peak GPU memory in GiB.
    """
    timer = StepTimer(rounds, profiled=profiled)

    @dataclass(frozen=True, slots=True)
    class Context(base.StageContext):
        def artifact(self, reference: str, kind: str, *, with_adapter: bool = False) -> Artifact:
            return Artifact(self.run_dir / reference, {})

        def metrics(self, total_steps: int) -> Any:
            return timer

    distributed.init_process_group()
    distributed.seed_everything(0)
    (run_dir / "bench").mkdir(exist_ok=True)
    context: Any = Context(SimpleNamespace(stages={}), "bench", run_dir, 0)  # pyright: ignore
    reset_peak()
    with contextlib.suppress(EnoughRounds):
        # Without the preflight, which rightly refuses to train a model with random weights.
        base.prepare_stage(spec, context).train()
    return timer, peak_gib()
