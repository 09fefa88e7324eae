"""Measured memory beside the prediction of ``align plan``: ``python -m benchmarks.plan_memory``.

Models with random weights train two steps of sft (full tuning, float32), with a checkpoint after
each, on this machine's CPU. Each row of the printed table is one run: the mean over the ranks of
the largest resident memory, and the largest phase of the prediction, in GiB.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.harness import ROOT
from benchmarks.workloads import EOS, PAD, SHAPES, Shape, write_model

MODELS = {
    "10.5M": SHAPES["10.5M"],
    "135M": SHAPES["135M"],
    "270M": Shape(640, 2048, 18, 4, 1, 262144),  # the vocabulary is that of Gemma 3
}
ROWS = 64
HEAD = "| model | ranks | ZeRO | measured | predicted | difference |\n|---|---|---|---|---|---|\n"


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured once."""

    model: str
    ranks: int
    stage: int


def main() -> None:
    """Measure each combination and print its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--zero", nargs="+", type=int, default=[0, 1, 2, 3])
    args = parser.parse_args()
    sys.stdout.write(HEAD)
    with tempfile.TemporaryDirectory() as name:
        for model in args.models:
            folder = Path(name) / model
            write_model(folder / "model", MODELS[model], dtype="float32")
            write_bytes(folder / "model")
            write_rows(folder / "rows.jsonl")
            for ranks in args.ranks:
                for stage in args.zero:
                    sys.stdout.write(table_row(folder, Run(model, ranks, stage)))
                    sys.stdout.flush()


def write_bytes(folder: Path) -> None:
    """Write a tokenizer of bytes: the models of other benchmarks read no text."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    tokens = [EOS, PAD, *sorted(ByteLevel.alphabet())]
    vocab = {token: i for i, token in enumerate(tokens)}
    named = {"eos_token": EOS, "pad_token": PAD, "unk_token": PAD}
    Qwen2TokenizerFast(vocab=vocab, merges=[], **named).save_pretrained(folder)


def write_rows(path: Path) -> None:
    """Write rows of nearly 64 bytes, of which four fill a micro-batch."""
    rows = [{"prompt": f"{i:020}", "completion": f"{i:038}"} for i in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table_row(folder: Path, run: Run) -> str:
    """Return the row of one run, whose cells say so if the run failed."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(folder, run)), encoding="utf-8")
    runs = folder / f"{run.ranks}-{run.stage}"
    cells = f"| {run.model} | {run.ranks} | {run.stage} "
    trained = align(["run", str(recipe), "--runs", str(runs)], runs)
    if trained.returncode != 0:
        sys.stderr.write(trained.stdout[-2000:])
        return f"{cells}| failed | | |\n"
    planned = align(["plan", str(recipe), "--runs", str(runs), "--only", "sft", "--json"], runs)
    phases = json.loads(planned.stdout)["stages"]["sft"]["phases"]
    manifest = json.loads((runs / "memory" / "sft" / "manifest.json").read_text(encoding="utf-8"))
    measured = manifest["peak_rss_gib"] / run.ranks
    predicted = max(phases.values()) / 2**30
    apart = predicted / measured - 1
    shutil.rmtree(runs)  # 8 GB of a model of 270M parameters
    return f"{cells}| {measured:.2f} | {predicted:.2f} | {apart:.0%} |\n"


def recipe_of(folder: Path, run: Run) -> dict[str, object]:
    """Return a recipe that brings the model and trains it for two steps."""
    base = {"kind": "base", "path": str(folder / "model"), "tokenizer": {"chat_template": "plain"}}
    sft = {
        **{"kind": "sft", "init": "base", "data": [{"path": str(folder / "rows.jsonl")}]},
        # Two micro-batches a rank: the gradients of the first are there while the second is run.
        **{"steps": 2, "batch_size": 8 * run.ranks, "max_length": 64, "micro_tokens": 256},
        **{"ranks": run.ranks, "zero": {"stage": run.stage}, "checkpoint_every": 1},
    }
    return {"name": "memory", "dtype": "float32", "stages": {"base": base, "sft": sft}}


def align(args: list[str], runs: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of align with one thread; its errors go into a file of the run's folder."""
    runs.mkdir(exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (runs / "errors.txt").open("a", encoding="utf-8") as errors:
        command = [sys.executable, "-m", "align.cli", *args]
        return subprocess.run(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
        )


if __name__ == "__main__":
    main()
