"""Save checkpoints of a TRL trainer as those of every stage: wait for space, hash, then prune."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from align.core import distributed
from align.core.checkpoints import (
    check_stage_is_ours,
    is_own,
    patient,
    remove,
    tensor_bytes,
    write_record,
)
from align.core.storage import MIB, write_patiently

HASHES = "hashes.json"
WRITERS = ("_save", "_save_rng_state", "_save_optimizer_and_scheduler", "create_model_card")
"""Methods of a trainer that write files, each on one rank without the others."""
COLLECTIVE = "_save_optimizer_and_scheduler"
"""The one in which DeepSpeed's ranks write together; its engine waits for each file instead."""


def save_patiently(trainer: Any, checkpoints: Path) -> None:
    """Make a trainer wait while the disk is full, in each part of a checkpoint."""
    save, on_deepspeed = trainer._save_checkpoint, trainer.is_deepspeed_enabled
    weights = tensor_bytes(trainer.model.state_dict())
    for name in WRITERS:
        if hasattr(trainer, name) and not (on_deepspeed and name == COLLECTIVE):
            write = _patiently(getattr(trainer, name), checkpoints, needed=weights)
            setattr(trainer, name, write)

    def save_checkpoint(*args: Any) -> None:
        state = trainer.state
        folder = checkpoints / f"checkpoint-{state.global_step}"
        distributed.on_first_rank(lambda: _begin(folder))
        write = type(state).save_to_json.__get__(state)
        state.save_to_json = _patiently(write, checkpoints, needed=MIB)
        with patient(trainer.model_wrapped, folder) if on_deepspeed else nullcontext():
            save(*args)

    trainer._save_checkpoint = save_checkpoint


def _patiently(write: Callable[..., Any], folder: Path, *, needed: int) -> Callable[..., Any]:
    def written(*args: object, **options: object) -> Any:
        return write_patiently(
            lambda: write(*args, **options),
            folder=folder,
            needed=needed,
            stop=distributed.was_asked,
        )

    return written


def _begin(folder: Path) -> None:
    """Remove what an earlier attempt left of a checkpoint, and what killed savings have left.

    Its record would count as a file of the new one, which would then never match its hash.
    """
    check_stage_is_ours(folder.parents[1])
    remove(folder)
    for left in in_order(folder.parent):
        if not (left / HASHES).exists():
            remove(left)


def complete(checkpoints: Path, step: int, keep: int) -> None:
    """Flush and hash a saved checkpoint, write its record last, and then remove older ones."""
    write_record(checkpoints / f"checkpoint-{step}", HASHES, {})
    for old in [p for p in in_order(checkpoints) if is_own(p, record=HASHES)][:-keep]:
        shutil.rmtree(old)


def in_order(checkpoints: Path) -> list[Path]:
    """Return the folders of checkpoints, oldest first."""
    steps = {p: p.name.removeprefix("checkpoint-") for p in checkpoints.glob("checkpoint-*")}
    return sorted((p for p in steps if steps[p].isdecimal()), key=lambda p: int(steps[p]))
