"""How the cost of align's step grows: ``python -m benchmarks.curves`` prints and keeps exponents.

CPU seconds of an optimizer step over one quantity at a time, and a line through the logarithms:
exponent 1 is proportional, 2 is attention's own square.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from align.core import distributed
from align.core.types import TokenRow
from align.models.fused_head import head_logprobs
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import OptimSpec, ZeroSpec
from align.stages.sft import collate, length_of, sft_loss
from align.training.batch import pack
from align.training.learner import Learner
from align.training.task import OfflineTask, micro_batches
from benchmarks.run import RESULTS, device_name, today
from benchmarks.workloads import SHAPES, write_model

MICRO_TOKENS = 4096


def main() -> None:
    """Measure every curve, print the exponents, write results/<device>/curves.json."""
    torch.set_num_threads(1)
    distributed.init_process_group()
    device, shape = device_name()
    vocab = SHAPES[shape].vocab_size
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch), SHAPES[shape], dtype="float32")
        learner = Learner(
            LogprobModel(load_policy(scratch, dtype="bfloat16")),
            optim=OptimSpec(learning_rate=1e-5, schedule="constant"),
            zero=ZeroSpec(),
            dtype="bfloat16",
            total_steps=10_000,
        )
    found = {
        "sequence length, one row": curve(
            (128, 256, 512, 1024, 2048, 4096), lambda n: _rows_step(learner, [n], vocab)
        ),
        "batch of rows of 256": curve(
            (1, 2, 4, 8, 16, 32), lambda n: _rows_step(learner, [256] * n, vocab)
        ),
        "answers of 64 to one prompt of 256": curve(
            (2, 4, 8, 16, 32), lambda n: _group_step(learner, n, vocab)
        ),
    }
    memory = {
        "tokens, vocabulary 4096": points((2**13, 2**14, 2**15), lambda n: _kept_mib(n, 4096)),
        "vocabulary, 8192 tokens": points((2**12, 2**14, 2**16), lambda v: _kept_mib(8192, v)),
    }
    whole = {"device": device, "date": today(), "cpu_seconds": found, "head_kept_mib": memory}
    path = RESULTS / device["folder"] / "curves.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(whole, indent=1))  # noqa: T201 - what the command is for


def curve(sizes: Sequence[int], step: Callable[[int], None]) -> dict[str, Any]:
    """Time ``step`` at each size (best of three after one) and fit exponents."""

    def seconds(size: int) -> float:
        step(size)
        best = math.inf
        for _ in range(3):
            began = time.process_time()
            step(size)
            best = min(best, time.process_time() - began)
        return best

    return points(sizes, seconds)


def points(sizes: Sequence[int], measure: Callable[[int], float]) -> dict[str, Any]:
    """Measure at each size; give the values, the fitted exponent and that of the last doubling."""
    values = [measure(size) for size in sizes]
    x, y = ([math.log(v) for v in series] for series in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope /= sum((a - mean_x) ** 2 for a in x)
    return {
        "sizes": list(sizes),
        "values": values,
        "exponent": slope,
        "last_exponent": (y[-1] - y[-2]) / (x[-1] - x[-2]),
    }


def random_row(length: int, vocab: int, *, trained_from: int = 1) -> TokenRow:
    """Return a row of random tokens, trained from ``trained_from`` on."""
    ids = torch.randint(2, vocab, (length,)).tolist()
    return TokenRow(tuple(ids), tuple(t >= trained_from for t in range(length)))


def _rows_step(learner: Learner, lengths: list[int], vocab: int) -> None:
    rows = [random_row(n, vocab) for n in lengths]
    task = OfflineTask(rows, [], length_of, collate, sft_loss)
    learner.step(micro_batches(task, rows, MICRO_TOKENS), sft_loss)


def _group_step(learner: Learner, answers: int, vocab: int) -> None:
    prompt = random_row(256, vocab).input_ids
    rows = []
    for _ in range(answers):
        answer = random_row(64, vocab)
        ids = prompt + answer.input_ids
        rows.append(TokenRow(ids, tuple(t >= 256 for t in range(len(ids)))))
    shared = [0] + [256] * (answers - 1)
    learner.step([pack(rows, counts={"tokens": 64.0 * answers}, shared=shared)], sft_loss)


def _kept_mib(num: int, vocab: int) -> float:
    """Return what the head keeps for the backward pass besides its weight, in MiB."""
    weight = torch.randn(vocab, 32, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.randn(num, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() != weight.data_ptr():
            kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    labels = torch.zeros(num, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        head_logprobs(hidden, weight, labels, temperature=1.0, entropy=True)
    return sum(kept.values()) / 2**20


if __name__ == "__main__":
    main()
