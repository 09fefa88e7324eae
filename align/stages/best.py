"""The best weights of a stage: kept by step while it trains, made its own at the end."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core import distributed
from align.recipe.schema import OfflineStage
from align.training.stopping import EarlyStopping


@dataclass(frozen=True, slots=True)
class BestWeights:
    """Keep weights by step under ``best/`` of the stage's folder.

    Attributes:
        write: writes the present weights below the folder ``out``; all ranks take part.
        out: the stage's folder.
    """

    write: Callable[..., None]
    out: Path

    def folder(self, step: int) -> Path:
        """Name the folder of a step's ``model/`` and, for LoRA, ``adapter/``."""
        return self.out / "best" / f"step-{step:08d}"

    def save(self, step: int) -> None:
        """Keep the present weights; all ranks must take part."""
        self.write(out=self.folder(step))

    def prune(self, steps: set[int]) -> None:
        """Forget all weights but those of the given steps."""
        if distributed.rank() == 0:
            kept = {self.folder(step) for step in steps}
            for folder in set((self.out / "best").glob("step-*")) - kept:
                shutil.rmtree(folder)
        distributed.barrier()

    def restore(self, step: int) -> None:
        """Make the weights of a step the stage's own; the files are shared, not copied."""
        if distributed.rank() == 0:
            for part in self.folder(step).iterdir():
                target = self.out / part.name
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(part, target, copy_function=os.link)
        distributed.barrier()


def build_stopping(spec: OfflineStage, best: BestWeights) -> EarlyStopping | None:
    """Give what stops an offline stage early, if its recipe asks for it."""
    if spec.keep.early_stopping is None:
        return None
    return EarlyStopping(spec.keep.early_stopping, save=best.save, prune=best.prune)


def stopping_notes(stopping: EarlyStopping) -> dict[str, Any]:
    """Give the manifest's notes on which weights were kept and why the stage ended."""
    found: dict[str, Any] = {
        "metric": stopping.spec.metric,
        "best_step": stopping.best_step,
        "last_step": stopping.history[-1][0],
        "stopped": stopping.stopped,
    }
    return {"early_stopping": found}
