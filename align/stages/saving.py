"""Save the trained model of a stage: all of its weights, and its adapter if it has one."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from align.core import distributed
from align.core.checkpoints import check_out_is_ours, save_weights
from align.core.storage import MIB, write_patiently
from align.models.loading import load_tokenizer, stop_token_ids
from align.models.logprobs import LogprobModel
from align.models.saving import fitting_weights, save_policy, write_weights
from align.recipe.schema import TrainingStage
from align.tuning.export import full_precision_weights, full_weights, gathered, saved_buffers
from align.tuning.files import adapter_state, save_adapter
from align.tuning.merging import adapter_parameters, has_adapter, is_quantized
from reward_models.classifier_files import BACKBONE, HEAD
from reward_models.scalar import RewardModel, drop_pooler

log = logging.getLogger(__name__)


def save_trained_policy(
    spec: TrainingStage, module: LogprobModel, *, source_dir: Path, out: Path
) -> None:
    """Write model/ and, with an adapter, adapter/; every rank must call this.

    model/ contains the merged weights if the adapter can be merged, otherwise the frozen weights.
    """
    write = partial(save_policy, source_dir=source_dir, directory=out / "model", dtype=spec.dtype)
    save_streamed(saved_tensors(module.model, source_dir), write, adapted=module.model, out=out)


def save_trained_scorer(model: RewardModel, *, source_dir: Path, out: Path) -> None:
    """Write a reward model as ``save_trained_policy`` writes a policy; every rank must call this.

    The head is trained in full and saved beside the merged backbone.
    """
    directory = out / "model"
    # The names that the file must have, from a backbone without storage.
    with torch.device("meta"):
        bare = AutoModel.from_config(
            AutoConfig.from_pretrained(str(source_dir), trust_remote_code=False)
        )
    drop_pooler(bare)
    expected = {*(f"{BACKBONE}{name}" for name in bare.state_dict()), HEAD}

    def named() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in saved_tensors(model.backbone, source_dir):
            yield f"{BACKBONE}{name}", tensor
        for name, tensor in full_weights(model.head):
            yield f"head.{name}", tensor

    def settings() -> Callable[[str], str]:
        return model.save_settings(
            directory,
            expected,
            tokenizer=load_tokenizer(source_dir),
            stop_token_ids=stop_token_ids(source_dir),
        )

    def write(weights: Iterable[tuple[str, Tensor]]) -> None:
        saved_as = write_patiently(settings, folder=out, needed=MIB, stop=distributed.was_asked)
        fitting = fitting_weights(weights, expected, what=type(bare).__name__)
        write_weights(((saved_as(name), tensor) for name, tensor in fitting), directory)

    save_streamed(named(), write, adapted=model.backbone, out=out)


def save_streamed(
    named: Iterable[tuple[str, Tensor]],
    write: Callable[[Iterable[tuple[str, Tensor]]], None],
    *,
    adapted: nn.Module,
    out: Path,
) -> None:
    """Write weights as they come, and an adapter; every rank must call this.

    Args:
        named: names and tensors; every rank consumes them. write: writes them on rank 0.
        adapted: the model that may have an adapter. out: gets model/ and adapter/.
    """
    log.info("saving the model")
    if distributed.rank() == 0:
        check_out_is_ours(out)
        write(named)
    else:
        # Under ZeRO-3 each tensor is gathered by all ranks, and only rank 0 keeps it.
        for _ in named:
            pass
    adapter = whole_adapter(adapted)
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
