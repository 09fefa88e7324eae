"""The best weights of a stage: saved by step during training, restored at the end."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from align.core import distributed
from align.recipe.schema import OfflineStage
from align.training.stopping import EarlyStopping


@dataclass(frozen=True, slots=True)
class BestWeights:
    """Weights saved by step under ``best/`` in the stage's folder.

    Attributes:
        write: writes the current weights below the folder ``out``; runs on every rank.
        out: the stage's folder.
    """

    write: Callable[..., None]
    out: Path

    def folder(self, step: int) -> Path:
        """Return the folder of a step's ``model/`` and, for LoRA, ``adapter/``."""
        return self.out / "best" / f"step-{step:08d}"

    def save(self, step: int) -> None:
        """Save the current weights; every rank must call this."""
        self.write(out=self.folder(step))

    def prune(self, steps: set[int]) -> None:
        """Delete all saved weights except those of the given steps; every rank must call this."""
        if distributed.rank() == 0:
            # Rank 0 deletes for all: the folder is shared.
            self.keep_only(steps)
        distributed.barrier()

    def keep_only(self, steps: set[int]) -> None:
        """Delete all saved weights except those of the given steps, in this process alone."""
        kept = {self.folder(step) for step in steps}
        for folder in set((self.out / "best").glob("step-*")) - kept:
            shutil.rmtree(folder)

    def restore(self, step: int) -> None:
        """Put a step's weights into the stage's folder, as hard links instead of copies."""
        if distributed.rank() == 0:
            # Links cost no disk space; the source may be deleted afterwards.
            for part in self.folder(step).iterdir():
                target = self.out / part.name
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(part, target, copy_function=os.link)
        distributed.barrier()


def build_stopping(spec: OfflineStage, best: BestWeights) -> EarlyStopping | None:
    """Return the early stopping of an offline stage, or None if the recipe has none."""
    if spec.keep.early_stopping is None:
        return None
    return EarlyStopping(
        spec.keep.early_stopping,
        save=best.save,
        prune=best.prune,
        keep_checkpoints=spec.keep_checkpoints,
    )


def tidy_after(stopping: EarlyStopping | None, best: BestWeights) -> Callable[[], None] | None:
    """Return what deletes the weights of all steps but the best one, once nothing can resume."""
    return None if stopping is None else partial(best.keep_only, {stopping.best_step})


def stopping_notes(stopping: EarlyStopping) -> dict[str, Any]:
    """Return the manifest's notes on which weights were kept and why the stage ended."""
    found: dict[str, Any] = {
        "metric": stopping.spec.metric,
        "best_step": stopping.best_step,
        "last_step": stopping.history[-1][0],
        "stopped": stopping.stopped,
    }
    return {"early_stopping": found}
