"""Wrap a model by its tuning spec: freeze weights, add modules, select trained parameters."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from align.core.errors import RecipeError
from align.models.loading import keep_layout, saved_names
from align.recipe.schema.tuning import (
    FullTuning,
    PissaTuning,
    QloraTuning,
    TuningSpec,
    VeraTuning,
)
from align.tuning.light_peft import peft_for
from align.tuning.rows import trainable_rows

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def add_tuner(
    model: "PreTrainedModel", tuning: TuningSpec, *, seed: int = 0, tokens: Sequence[int] = ()
) -> Any:
    """Freeze ``model`` and add what ``tuning`` trains; ``full`` returns the model unchanged.

    Args:
        model: a transformers model, with or without a head.
        tuning: the recipe's tuning block.
        seed: random seed of new weights; every rank and every resumed process must pass the same.
        tokens: their rows of the embeddings are trained too, by methods that can.

    Raises:
        RecipeError: the model does not have the parts that the method needs.
    """
    if isinstance(tuning, FullTuning):
        return model
    if tuning.builder is None:
        return model.requires_grad_(False)
    module, _, builder = tuning.builder.partition(":")
    config = getattr(import_module(module), builder)(model, tuning)
    if tokens:
        config.trainable_token_indices = trainable_rows(model, tokens, tuning)
    # New weights depend only on the seed, and the process's random state is not consumed.
    with torch.random.fork_rng(devices=_devices()):
        torch.manual_seed(seed)
        if tuning.virtual:
            from align.tuning.virtual import VirtualTokens

            return VirtualTokens(model, config)
        if isinstance(tuning, QloraTuning):
            _check_saved_names(model)
            keep_layout(model)
            _leave_scales_out(model)
        wrapped = _adapted(model, config, tuning)
        if isinstance(tuning, PissaTuning):
            from align.tuning.pissa import remember_start

            remember_start(wrapped)
    return wrapped


def _adapted(model: "PreTrainedModel", config: "PeftConfig", tuning: TuningSpec) -> "PeftModel":
    """Return peft's model around ``model``.

    Raises:
        RecipeError: peft does not know the model's layers.
    """
    try:
        # DeepSpeed casts parameters to bfloat16 but not buffers, and VeRA's matrices are buffers.
        return peft_for(model).get_peft_model(
            model, config, autocast_adapter_dtype=not isinstance(tuning, VeraTuning)
        )
    # peft refuses layers that a method does not know in many ways, all of them at once.
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        told = " ".join(str(error).split())[:300]
        raise RecipeError(
            f"tuning.method {tuning.method}: peft cannot adapt {type(model).__name__}: {told}. "
            "Use method lora, or name other layers (tuning.targets)"
        ) from error


def _check_saved_names(model: "PreTrainedModel") -> None:
    """Raise if the files of a 4-bit model have its weights under other names.

    The trained updates are added to the weights in full precision, which only the files have.

    Raises:
        RecipeError: names a weight.
    """
    files = sorted(Path(str(model.name_or_path)).glob("*.safetensors"))
    prefix = model.base_model_prefix
    saved = {name.removeprefix(f"{prefix}.") for name in saved_names(files)}
    # Only experts: heads and poolers may be new.
    experts = [name for name, p in model.named_parameters() if p.ndim > 2]
    lacking = [name for name in experts if name.removeprefix(f"{prefix}.") not in saved]
    if files and lacking:
        raise RecipeError(
            f"tuning.method qlora: the files of {model.name_or_path} have no weight {lacking[0]}: "
            f"transformers makes it of others when it loads a {type(model).__name__}, so the full "
            "precision that the saved model needs is not there. Use method lora"
        )


def _leave_scales_out(model: nn.Module) -> None:
    """Exclude the scales of 4-bit weights from checkpoints, since they cannot be loaded from there.

    A resumed stage quantizes its initial weights again, to the same scales.
    """

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
            del state[name]

    for module in model.modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.register_state_dict_post_hook(leave_out)


def _devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []
