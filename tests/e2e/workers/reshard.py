"""Save checkpoints after two of four steps, and continue those of other ranks and ZeRO stages."""

import argparse
from pathlib import Path
from typing import Any

import torch
from ranks import STEPS, learner_of, policy_model, sft_steps, weights_of

from align.core import artifacts, checkpoints, distributed
from align.core.checkpoints import (
    belong_to,
    load_checkpoint,
    newest_checkpoint,
    resharded,
    save_checkpoint,
)
from align.core.errors import ArtifactError

HALF = 2


def saved(out: Path, ranks: int, stage: int) -> Path:
    return out / "checkpoints" / f"{ranks}-{stage}"


def save(out: Path, stage: int) -> dict[str, Any]:
    """Train without a break, and save the checkpoint half-way."""
    learner = learner_of(policy_model(), stage)
    stats = sft_steps(learner, range(HALF))
    folder = saved(out, distributed.world_size(), stage)
    folder.parent.mkdir(exist_ok=True)
    save_checkpoint(folder, HALF, engines={"policy": learner.engine}, state={"a": 1}, keep=1)
    stats += sft_steps(learner, range(HALF, STEPS))
    return {"loss": [s["loss"] for s in stats], "weights": weights_of(learner.module.model)}


def hashing(out: Path) -> dict[str, Any]:
    """Save a checkpoint of ZeRO-3; give what this rank hashed, and which damage it sees."""
    noted: list[str] = []
    plain = checkpoints.file_record

    def noting(path: Path, *, sync: bool = False) -> dict[str, Any]:
        noted.append(path.name)
        return plain(path, sync=sync)

    learner = learner_of(policy_model(), 3)
    sft_steps(learner, range(1))
    folder = out / "hashed"
    if distributed.rank() == 0:
        folder.mkdir()
    distributed.barrier()
    checkpoints.file_record = artifacts.file_record = noting
    path = save_checkpoint(folder, 1, engines={"policy": learner.engine}, state={}, keep=1)
    checkpoints.file_record = artifacts.file_record = plain
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "checkpoint.json")
    seen = {}
    whole = newest_checkpoint(folder) == path
    for file in files:
        if distributed.rank() == 0:
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        distributed.barrier()
        seen[file.name] = newest_checkpoint(folder) is None
        distributed.barrier()
        if distributed.rank() == 0:
            file.write_bytes(content)
    distributed.barrier()
    return {"noted": noted, "files": [p.name for p in files], "seen": seen, "whole": whole}


def resume(out: Path, ranks: int, old: int, new: int) -> dict[str, Any]:
    """Continue from a checkpoint of another layout; without consent it is refused."""
    path = newest_checkpoint(saved(out, ranks, old))
    assert path is not None
    learner = learner_of(policy_model(), new)
    belong_to(None)
    said = ""
    try:
        load_checkpoint(path, {"policy": learner.engine})
    except ArtifactError as error:
        said = str(error)
    belong_to(None, any_layout=True)
    learner.steps, state = load_checkpoint(path, {"policy": learner.engine})
    assert state == {"a": 1}
    loaded = weights_of(learner.module.model)
    stats = sft_steps(learner, range(learner.steps, STEPS))
    # The change stays in the history, and what is saved now is a plain checkpoint of this layout.
    folder = out / "later" / f"{ranks}-{old}-{distributed.world_size()}-{new}"
    folder.parent.mkdir(exist_ok=True)
    later = save_checkpoint(folder, STEPS, engines={"policy": learner.engine}, state={}, keep=1)
    history = resharded()
    belong_to(None)
    again = learner_of(policy_model(), new)
    load_checkpoint(later, {"policy": again.engine})
    found = {
        "said": said,
        "loaded": loaded,
        "loss": [s["loss"] for s in stats],
        "weights": weights_of(learner.module.model),
        "again": weights_of(again.module.model),
        "history": (history, resharded()),
        "left": sorted(p.name for p in path.parent.iterdir()),
    }
    belong_to(None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--save", nargs="*", type=int, default=[])
    parser.add_argument("--load", nargs="*", default=[], help="ranks-stage-new stage")
    args = parser.parse_args()
    distributed.init_process_group()
    torch.set_num_threads(1)
    here = distributed.world_size()
    found: dict[str, Any] = {f"{here}-{stage}": save(args.out, stage) for stage in args.save}
    if here == 2 and args.save:
        found["hashing"] = hashing(args.out)
    for name in args.load:
        ranks, old, new = map(int, name.split("-"))
        found[f"{ranks}-{old}-{here}-{new}"] = resume(args.out, ranks, old, new)
    torch.save(found, args.out / f"{distributed.rank()}of{here}-{'save' if args.save else ''}.pt")
    distributed.barrier()
    distributed.end_process(0)


if __name__ == "__main__":
    main()
