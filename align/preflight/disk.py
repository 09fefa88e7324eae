"""The check that the disk has room for what a training stage writes."""

from functools import partial
from pathlib import Path

from torch import nn

from align.core.storage import MIB, device_of, free_bytes
from align.preflight.checks import Check, Finding
from align.recipe.schema import OfflineStage, OnlineStage, TrainingStage
from align.tuning.files import num_trained

MOMENTS_BYTES = 8
"""AdamW's two moments of a trained weight, in float32."""


def disk_checks(spec: TrainingStage, model: nn.Module, folder: Path) -> list[Check]:
    """Return the check on the disk; ``folder`` is the stage's folder."""
    return [("disk", partial(room, spec, *num_trained(model), folder=folder))]


def checkpoint_bytes(spec: TrainingStage, trained: int, total: int) -> int:
    """Return the size of one checkpoint.

    Args:
        spec: the stage.
        trained: number of trained parameters of the policy. total: number of all.
    """
    width = 4 if spec.dtype == "float32" else 2
    # With 16-bit weights, the optimizer also has a copy of each trained weight in float32.
    state = MOMENTS_BYTES + (0 if width == 4 else 4)
    size = total * width + trained * state
    if isinstance(spec, OnlineStage) and spec.critic is not None:
        size += total * (width + state)  # the critic is trained in full
    return size


def bytes_to_write(spec: TrainingStage, trained: int, total: int) -> tuple[int, int, int]:
    """Return the bytes that a stage writes at most at one time, of a checkpoint, and their number.

    A new checkpoint is complete before the oldest is removed. With ``checkpoint_every: 0`` one is
    written if a signal stops the stage.
    """
    checkpoint = checkpoint_bytes(spec, trained, total)
    number = spec.keep_checkpoints + 1 if spec.checkpoint_every else 1
    model = total * (4 if spec.dtype == "float32" else 2)
    # The best weights so far and the next candidate; the saved model is a link to them.
    best = spec.watch if isinstance(spec, OnlineStage) else None
    if isinstance(spec, OfflineStage):
        best = spec.keep.early_stopping
    return number * checkpoint + (1 if best is None else 2) * model, checkpoint, number


def room(spec: TrainingStage, trained: int, total: int, *, folder: Path) -> Finding:
    """Compare what the stage still writes with the free space of its device."""
    needed, checkpoint, number = bytes_to_write(spec, trained, total)
    present = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    free = free_bytes(folder)
    plural = "s" if number > 1 else ""
    # A run under 10 minutes writes no checkpoint by itself, and one if a signal stops it.
    short = spec.checkpoint_every == "auto" and needed - (number - 1) * checkpoint <= free + present
    return Finding(
        f"writes about {_mib(needed)} MiB: {number} checkpoint{plural} of {_mib(checkpoint)} MiB "
        "and the model",
        f"{_mib(free + present)} MiB free",
        "ok" if needed <= free + present else "warn" if short else "fail",
        f"no space left on {device_of(folder)} for it: free some, use another device with --runs, "
        "lower keep_checkpoints, or set checkpoint_every: 0",
    )


def _mib(size: int) -> str:
    return f"{-(-size // MIB):,}"
