"""What a qlora stage saved, read back: another model than the one that it trained in 4 bits.

``model/`` is the update merged into full-precision weights. A stage therefore measures its held-out
loss once more on what it saved: beside ``eval/loss`` it says what leaving the 4 bits changed.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from align.core import distributed
from align.training.offline import OfflineTask, evaluate_rows

log = logging.getLogger(__name__)
LOSS_SAVED = "eval/loss_saved"
Model = TypeVar("Model", bound=nn.Module)


def read_back(load: Callable[[], Model]) -> Model | None:
    """Load what was saved beside the trained model; None on every rank where it does not fit.

    Full-precision weights take four times the memory of those in 4 bits or more, so on an
    accelerator that holds the one the other may not fit. All ranks must take part.
    """
    try:
        model = load()
    except torch.OutOfMemoryError:
        model = None
    if distributed.global_sum(float(model is None)):
        log.warning(
            "the saved full-precision model does not fit beside the trained one: %s is not "
            "measured; an evaluate stage can score what was saved", LOSS_SAVED,
        )  # fmt: skip
        return None
    return model


def saved_loss(model: nn.Module, task: OfflineTask[Any], micro_tokens: int) -> dict[str, float]:
    """Give the held-out loss of what was saved, under its own name; nothing without held-out rows.

    The task's references (dpo, kto) stay those of the training: the 4-bit start.
    """
    if not task.heldout:
        return {}
    return {LOSS_SAVED: evaluate_rows(model, task, micro_tokens)["eval/loss"]}
