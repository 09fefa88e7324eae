"""Memory of each rank under ZeRO-3: ``python -m benchmarks.shard_memory --size 500M --ranks 4``.

A random model in float32 is loaded in shards, takes two steps, and is saved. Each line is one
phase: the largest resident memory of a rank, beside what a rank must have (its part of the states,
one layer, and the libraries, which is all that a tiny model takes) and the ratio to it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.workloads import Shape, write_model

SIZES = {
    "tiny": Shape(64, 128, 2, 2, 1, 1024),
    "50M": Shape(512, 1536, 12, 8, 4, 16384),
    "100M": Shape(768, 2304, 13, 12, 4, 16384),
    "500M": Shape(1280, 3840, 23, 20, 5, 32768),
}
BYTES = {"weights": 4, "master weights": 4, "gradients": 4, "moments": 8}
"""Bytes of a parameter's states in float32."""
TOKENS = 64


def main() -> None:
    """Run the ranks and print the largest peak of each phase."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="100M")
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    tiny = max(run_ranks("tiny", args.ranks)["phases"].values())
    found = run_ranks(args.size, args.ranks)
    states = found["total"] * sum(BYTES.values()) / args.ranks / 2**30
    layer = found["layer"] * BYTES["weights"] / 2**30
    must = states + layer + tiny
    say(f"{found['total'] / 1e6:.0f}M parameters on {args.ranks} ranks, GiB of a rank: states")
    say(f" {states:.2f}, one layer {layer:.2f}, libraries {tiny:.2f}, together {must:.2f}\n")
    for phase, peak in found["phases"].items():
        say(f"{phase:<12} {peak:6.2f}  {peak / must:5.2f}\n")


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def run_ranks(size: str, ranks: int) -> dict[str, Any]:
    """Return what the ranks found: the sizes, and the largest peak of each phase."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_process([], "write", folder, size=size)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        in_process(launcher, "rank", folder, size=size)
        files = sorted(folder.glob("rank-*.json"))
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    phases = found[0]["phases"]
    return found[0] | {"phases": {p: max(rank["phases"][p] for rank in found) for p in phases}}


def in_process(launcher: list[str], name: str, folder: Path, *, size: str) -> None:
    """Do one part of the work in processes of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "benchmarks.shard_memory", name]
    subprocess.run([*command, str(folder), size], env=env, check=True)


def side(name: str, folder: str, size: str) -> None:
    """Do one part of the work in this process."""
    if name == "write":
        write_model(Path(folder) / "model", SIZES[size], dtype="float32")
    else:
        rank(Path(folder))


class Peaks:
    """The largest resident memory of each phase of this process, in GiB."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """Note the peak since the last phase's end."""
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        self.found[phase] = int(line.split()[1]) / 2**20
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def rank(folder: Path) -> None:
    """Be one rank: load, train and save, and write down the peaks."""
    from align.core import distributed
    from align.core.artifacts import Artifact
    from align.core.checkpoints import save_checkpoint
    from align.recipe.schema import SftStage
    from align.stages.offline import build_policy
    from align.stages.saving import save_trained_policy
    from align.stages.sft import collate, length_of, sft_loss
    from align.training.learner import Learner
    from align.training.task import OfflineTask, micro_batches
    from benchmarks.curves import random_row

    distributed.init_process_group()
    peaks = Peaks()
    peaks.end("libraries")
    source, out = Artifact(folder, {}), folder / "out"
    out.mkdir(exist_ok=True)
    settings = {"init": "x", "data": [{"path": "x"}], "zero": {"stage": 3}, "dtype": "float32"}
    spec = SftStage(kind="sft", **settings)  # type: ignore[arg-type]
    module = build_policy(spec, source.model_dir)
    peaks.end("load")
    sizes = {name: p.ds_numel for name, p in module.named_parameters()}
    learner = Learner(module, optim=spec.optim, zero=spec.zero, dtype=spec.dtype, total_steps=10)
    peaks.end("optimizer")
    rows = [random_row(TOKENS, 1024) for _ in range(distributed.world_size())]
    task = OfflineTask(rows, [], length_of, collate, sft_loss)
    for _ in range(2):
        learner.step(micro_batches(task, rows, TOKENS), sft_loss)
    peaks.end("step")
    engines = {"policy": learner.engine}
    save_checkpoint(out / "checkpoints", 2, engines=engines, state={}, keep=1)
    peaks.end("checkpoint")
    save_trained_policy(spec, module, source_dir=source.model_dir, out=out)
    peaks.end("save")
    found = {"total": sum(sizes.values()), "layer": _largest(sizes), "phases": peaks.found}
    path = folder / f"rank-{distributed.rank()}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.end_process(0)


def _largest(sizes: dict[str, int]) -> int:
    """Return the parameters of the largest layer; the embeddings are one."""
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        _, is_layer, rest = name.partition(".layers.")
        layer = rest.split(".")[0] if is_layer else name
        layers[layer] = layers.get(layer, 0) + size
    return max(layers.values())


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in ("write", "rank"):
        side(*sys.argv[1:])
    else:
        main()
