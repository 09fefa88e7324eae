"""Checkpoints of a running stage: temporary name, hashes, rename; verified before they are loaded.

A checkpoint is a folder ``step-00000042`` that holds one DeepSpeed checkpoint per engine, one RNG
file per rank and ``checkpoint.json``, which is written last.
"""

import json
import logging
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.core import distributed
from align.core.artefacts import file_sha256, fsync_directory, hash_tree, write_json_atomic
from align.core.errors import ArtefactError

log = logging.getLogger(__name__)
STATE = "checkpoint.json"


def save_checkpoint(
    directory: Path, step: int, engines: Mapping[str, Any], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Save engines (model, optimiser), every rank's RNG and ``state`` after ``step`` steps.

    Args:
        directory: the stage's checkpoints folder.
        step: optimiser (or rollout) steps done.
        engines: name -> DeepSpeed engine.
        state: JSON values of the stage itself; data positions are functions of the step.
        keep: newest checkpoints to keep; older ones are removed after this one is in place.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f"step-{step:08d}.tmp"
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(temporary), tag=name, save_latest=False)
    torch.save(rng_state(), temporary / f"rng-{distributed.rank()}.pt")
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        record = {"step": step, "world_size": distributed.world_size(), "state": dict(state)}
        write_json_atomic(temporary / STATE, {**record, "files": hash_tree(temporary)})
        temporary.rename(final)
        fsync_directory(directory)
        for old in _complete(directory)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return final


def newest_checkpoint(directory: Path) -> Path | None:
    """Find the newest checkpoint whose every file has the recorded size and hash.

    A damaged one is named in the log and passed over. Every rank gets rank 0's answer.
    """
    found = None
    if distributed.rank() == 0:
        for path in sorted(directory.glob("step-????????"), reverse=True):
            problem = damage(path)
            if problem is None:
                found = path
                break
            log.warning("%s: damaged (%s); trying the one before it", path, problem)
    return distributed.broadcast_object(found)


def load_checkpoint(path: Path, engines: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Restore engines and this rank's RNG; give the step and the stage's own state."""
    record = json.loads((path / STATE).read_text(encoding="utf-8"))
    if record["world_size"] != distributed.world_size():
        raise ArtefactError(
            f"{path}: saved by {record['world_size']} ranks, resumed with "
            f"{distributed.world_size()}; start the same number of ranks or use --force"
        )
    for name, engine in engines.items():
        loaded, _ = engine.load_checkpoint(str(path), tag=name)
        if loaded is None:
            raise ArtefactError(f"{path}: DeepSpeed could not load engine '{name}'; use --force")
    set_rng_state(torch.load(path / f"rng-{distributed.rank()}.pt", weights_only=True))
    return record["step"], record["state"]


def _complete(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("step-????????") if (p / STATE).is_file())


def damage(path: Path, *, record: str = STATE) -> str | None:
    """Say what is wrong with a checkpoint whose file ``record`` holds the hashes; None if well."""
    try:
        files = json.loads((path / record).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                return f"{name} differs from its recorded hash"
    except (OSError, ValueError, KeyError) as e:
        return f"{record}: {e}"
    return None


def rng_state() -> dict[str, Any]:
    """Give the state of every random generator of this process."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what ``rng_state`` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
