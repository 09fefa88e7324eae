"""Save the trained policy of a stage: all of its weights, and its adapter if it has one."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from align.core import distributed
from align.core.artifacts import Artifact
from align.core.checkpoints import save_weights
from align.models.loading import save_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import TrainingStage
from align.tuning.export import full_precision_weights, full_weights, gathered, saved_buffers
from align.tuning.files import adapter_state, save_adapter
from align.tuning.merging import adapter_parameters, is_quantized
from align.tuning.wrap import has_adapter

log = logging.getLogger(__name__)


def save_trained_policy(
    spec: TrainingStage, module: LogprobModel, *, source: Artifact, out: Path
) -> None:
    """Write model/ and, with an adapter, adapter/; every rank must call this.

    model/ contains the merged weights if the adapter can be merged, otherwise the frozen weights.
    """
    log.info("saving the model")
    state, adapter = whole_state(module.model, source)

    def write() -> None:
        save_policy(state, source_dir=source.model_dir, directory=out / "model", dtype=spec.dtype)
        if adapter is not None:
            save_adapter(*adapter, out / "adapter")

    save_weights(write, state, out)
    distributed.barrier()


def whole_state(
    model: nn.Module, source: Artifact
) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], Any] | None]:
    """Return copies of a model's weights, and of its adapter's tensors and configuration if any.

    Under ZeRO-3 each rank has only a part of them, so every rank must call this. Only rank 0 keeps
    the copies; the other ranks return no weights.
    """
    if any(map(is_quantized, model.parameters())):
        named = full_precision_weights(model, source.model_dir)
    else:
        named = full_weights(model)
    state = {}
    # Every rank iterates, since each tensor is gathered; only rank 0 copies it to the CPU.
    for name, tensor in named:
        if distributed.rank() == 0:
            state[name] = tensor.detach().cpu().clone()
    if distributed.rank() == 0:
        state |= {name: buffer.cpu().clone() for name, buffer in saved_buffers(model)}
    if not has_adapter(model):
        return state, None
    # Adapters are small: gathered all at once.
    with gathered([p for _, p in adapter_parameters(model)]):
        return state, adapter_state(model)
