"""Save the trained policy of a stage: all of its weights, and its adapter if it has one."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from align.core import distributed
from align.core.checkpoints import check_out_is_ours, save_weights
from align.models.logprobs import LogprobModel
from align.models.saving import save_policy
from align.recipe.schema import TrainingStage
from align.tuning.export import full_precision_weights, full_weights, gathered, saved_buffers
from align.tuning.files import adapter_state, save_adapter
from align.tuning.merging import adapter_parameters, has_adapter, is_quantized

log = logging.getLogger(__name__)


def save_trained_policy(
    spec: TrainingStage, module: LogprobModel, *, source_dir: Path, out: Path
) -> None:
    """Write model/ and, with an adapter, adapter/; every rank must call this.

    model/ contains the merged weights if the adapter can be merged, otherwise the frozen weights.
    """
    log.info("saving the model")
    named = saved_tensors(module.model, source_dir)
    if distributed.rank() == 0:
        check_out_is_ours(out)
        model = out / "model"
        save_policy(named, source_dir=source_dir, directory=model, dtype=spec.dtype)
    else:
        # Under ZeRO-3 each tensor is gathered by all ranks, and only rank 0 keeps it.
        for _ in named:
            pass
    adapter = whole_adapter(module.model)
    if adapter is not None:
        save_weights(lambda: save_adapter(*adapter, out / "adapter"), adapter[0], out)
    distributed.barrier()


def saved_tensors(model: nn.Module, source_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and buffers of a model as they are saved, one at a time.

    Under ZeRO-3 every rank must consume them, in step.
    """
    if any(map(is_quantized, model.parameters())):
        yield from full_precision_weights(model, source_dir)
    else:
        yield from full_weights(model)
    yield from saved_buffers(model)


def whole_state(
    model: nn.Module, source_dir: Path
) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], Any] | None]:
    """Return copies of a model's weights, and of its adapter's tensors and configuration if any.

    Under ZeRO-3 each rank has only a part of them, so every rank must call this. Only rank 0 keeps
    the copies; the other ranks return no weights.
    """
    state = {}
    # Every rank iterates, since each tensor is gathered; only rank 0 copies it to the CPU.
    for name, tensor in saved_tensors(model, source_dir):
        if distributed.rank() == 0:
            state[name] = tensor.detach().cpu().clone()
    return state, whole_adapter(model)


def whole_adapter(model: nn.Module) -> tuple[dict[str, Tensor], Any] | None:
    """Return the tensors and the configuration of a model's adapter, None if it has none."""
    if not has_adapter(model):
        return None
    # Adapters are small: gathered all at once.
    with gathered([p for _, p in adapter_parameters(model)]):
        return adapter_state(model)
