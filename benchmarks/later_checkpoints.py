"""Compare a checkpoint that training waits for with one that a thread writes from a copy.

    python -m benchmarks.later_checkpoints --rounds 6

The second way is a prototype: it writes and hashes the files, but no record that completes them.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from align.core import checkpoints, distributed
from align.core.artifacts import file_record
from align.core.types import TokenRow
from align.models.attention import PACKED
from align.models.logprobs import LogprobModel
from align.recipe.schema import OptimSpec, ZeroSpec
from align.stages.sft import collate, length_of, sft_loss
from align.training.learner import Learner
from align.training.task import OfflineTask, micro_batches

VOCAB, LENGTH, STEPS = 16_000, 128, 2


def made() -> Learner:
    """Return a model of 40M parameters under ZeRO-1 in float32."""
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        attn_implementation=PACKED,
    )
    return Learner(
        LogprobModel(Qwen2ForCausalLM(config)),
        optim=OptimSpec(learning_rate=1e-4),
        zero=ZeroSpec(stage=1),
        dtype="float32",
        total_steps=10**6,
    )


def copied(x: Any) -> Any:
    """Return nested mappings and lists with copies of their tensors."""
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", copy=True)
    if isinstance(x, dict):
        return {key: copied(value) for key, value in x.items()}
    return [copied(value) for value in x] if isinstance(x, list) else x


def at_once(learner: Learner, folder: Path, steps: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds that training waits, and all seconds of a save and the steps after it."""
    began = time.monotonic()
    engines = {"policy": learner.engine}
    checkpoints.save_checkpoint(folder / "checkpoints", 1, engines=engines, state={}, keep=1)
    waited = time.monotonic() - began
    steps()
    return waited, time.monotonic() - began


def later(learner: Learner, folder: Path, steps: Callable[[], None]) -> tuple[float, float]:
    """Return the same with a thread that writes while the steps are taken."""
    parts: list[tuple[Any, Path]] = []
    writer = learner.engine.checkpoint_engine
    save, out = writer.save, folder / "later"

    def write() -> None:
        for state, path in parts:
            save(state, str(path))
            file_record(path, sync=True)

    def keep(state_dict: Any, path: str) -> None:
        parts.append((copied(state_dict), Path(path)))

    (out / "policy").mkdir(parents=True)
    thread = threading.Thread(target=write)
    began = time.monotonic()
    writer.save = keep
    learner.engine.save_checkpoint(str(out), tag="policy", save_latest=False)
    del writer.save
    waited = time.monotonic() - began
    thread.start()
    steps()
    ended = time.monotonic()
    thread.join()
    now = time.monotonic()
    shutil.rmtree(out)
    return waited + now - ended, now - began


def main() -> None:
    """Alternate both ways and print the ratios of their medians."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    distributed.init_process_group()
    learner = made()
    task = OfflineTask([], [], length_of, collate, sft_loss)
    ids = torch.randint(2, VOCAB, (4, LENGTH)).tolist()
    rows = [TokenRow(tuple(row), (True,) * LENGTH) for row in ids]

    def steps() -> None:
        for _ in range(STEPS):
            learner.step(micro_batches(task, rows, 4 * LENGTH), sft_loss)

    steps()
    found: dict[Any, list[tuple[float, float]]] = {at_once: [], later: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for way, seconds in found.items():
                seconds.append(way(learner, Path(folder), steps))
    for i, what in enumerate(("waiting", f"a save and {STEPS} steps")):
        old, new = (statistics.median(s[i] for s in found[way]) for way in (at_once, later))
        sys.stdout.write(f"{what}: {old:.2f} s at once, {new:.2f} s later, ratio {new / old:.2f}\n")


if __name__ == "__main__":
    main()
