"""Export full weights from a sharded or adapted model, tensor by tensor."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.core.errors import TrainingError
from align.models.loading import saved_weights
from align.models.logprobs import causal_lm
from align.tuning.inserted import InsertedLayer
from align.tuning.merging import (
    adapted_layers,
    dequantized,
    is_quantized,
    keep_update,
    merged_parameters,
)

_WRAPPED = ("base_layer.", "original_module.")
_ROWS = "token_adapter"
"""Part of the name of a table of which peft trains single rows, also in a head that is tied."""
_NESTED = ".base_layer"


def full_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight in full under its name in the saved model, one at a time.

    The model can be plain, under ZeRO 0-3, or have an adapter. An adapter that can be merged is
    added to copies, one layer at a time, and the model is not changed; other adapters are left out.
    4-bit weights are dequantized. A tied weight is yielded once, under its first name. Under
    ZeRO-3, every rank must consume all weights, in step.

    Args:
        module: the Hugging Face model, or what align.tuning made of it (no DeepSpeed engine).

    Yields:
        Name and detached tensor. The tensor is a copy under ZeRO-3 and for adapted layers. In all
        other cases it shares the parameter's memory.
    """
    base: Any = causal_lm(module)
    layers = adapted_layers(base)
    _refuse_adapted_ties(base)
    # A layer is merged once, at the first of its parameters.
    done: set[str] = set()
    for name, parameter in base.named_parameters():
        owner, inner = _owner(name, layers)
        # The adapter's own tensors are not part of the saved model.
        if owner is not None and not inner.startswith("base_layer."):
            continue
        if owner is not None and not isinstance(layers[owner], InsertedLayer):
            if owner not in done:
                done.add(owner)
                yield from _merged(owner, layers[owner])
        elif ".modules_to_save." not in name:
            saved = _saved_copy(base, name)
            yield checkpoint_name(name), full_tensor(parameter if saved is None else saved)


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a saved model has, under their names there.

    An example is the bias of DeepSeek-V3's routers: it is not a parameter, and
    nothing here trains it.
    """
    base: Any = causal_lm(module)
    layers = adapted_layers(base)
    for place, part in base.named_modules():
        kept = part._buffers.keys() - part._non_persistent_buffers_set
        for name in sorted(kept):
            whole = f"{place}.{name}".lstrip(".")
            owner, inner = _owner(whole, layers)
            # An adapter's own buffers are not part of the saved model.
            if part._buffers[name] is not None and (
                owner is None or inner.startswith("base_layer.")
            ):
                yield checkpoint_name(whole), part._buffers[name].detach()


def full_precision_weights(module: nn.Module, model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of ``model_dir`` plus the updates that were trained with 4-bit copies.

    The saved model has full precision. Merging into the 4-bit weights would keep their rounding
    error (arXiv:2305.14314 trains the update beside the quantized weights).

    Args:
        module: a model of the qlora method, with or without its head.
        model_dir: the model that was quantized.
    """
    base: Any = causal_lm(module)
    layers = adapted_layers(base)
    names = {checkpoint_name(n) for n, _ in base.named_parameters()}
    for saved_name, tensor in saved_weights(model_dir):
        # A backbone without its head has names without the model's prefix.
        name = saved_name
        if name not in names:
            name = name.removeprefix(f"{base.base_model_prefix}.")
        if name not in names:
            continue
        place = name.removesuffix(".weight") if name.endswith(".weight") else name
        if (layer := layers.get(place)) is not None:
            with gathered(list(layer.parameters())):
                # W + scale * B A, on the CPU: the full-precision weights need not fit on the
                # accelerator.
                for adapter in layer.active_adapters:
                    update = layer.get_delta_weight(adapter).float().cpu()
                    tensor = keep_update(tensor.float() + update, tensor.dtype)
        elif (layer := layers.get(f"{place}.{_ROWS}")) is not None:
            for adapter, rows in layer.token_indices.items():
                total = tensor.float()
                total[rows] = layer.trainable_tokens_delta[adapter].detach().float().cpu()
                tensor = keep_update(total, tensor.dtype)
        yield name, tensor


def checkpoint_name(name: str) -> str:
    """Return a parameter's name without the parts that peft adds.

    ``base_model.model.model.norm.weight`` becomes ``model.norm.weight``.
    """
    name = name.removeprefix("base_model.model.")
    for part in (*_WRAPPED, f"{_ROWS}."):
        name = name.replace(part, "")
    return name


@torch.no_grad()
def full_tensor(parameter: Tensor) -> Tensor:
    """Return a whole weight, gathered or dequantized if necessary."""
    with gathered([parameter]):
        if is_quantized(parameter):
            return dequantized(parameter)
        weight = parameter.detach()
        # Gathered memory is freed on exit, but a loader may keep the tensor longer.
        return weight.clone() if hasattr(parameter, "ds_id") else weight


def _merged(owner: str, layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the weights of an adapted layer with its adapter merged."""
    with gathered(list(layer.parameters())):
        found = merged_parameters(layer)
        return [(checkpoint_name(f"{owner}.{name}"), x.clone()) for name, x in found]


def _owner(name: str, layers: dict[str, Any]) -> tuple[str | None, str]:
    """Return the adapted layer that a parameter belongs to, and the rest of its name."""
    # The longest prefix that is an adapted layer; parameters may be nested below it.
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        if (owner := ".".join(parts[:i])) in layers:
            # Adapters of several parameters of one module, as of experts, are nested.
            while owner.endswith(_NESTED) and owner.removesuffix(_NESTED) in layers:
                owner = owner.removesuffix(_NESTED)
            return owner, name.removeprefix(f"{owner}.")
    return None, name


@contextlib.contextmanager
def gathered(parameters: list[Tensor]) -> Iterator[None]:
    """Gather whole ZeRO-3 parameters inside the block; other parameters are not affected."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def _saved_copy(module: nn.Module, name: str) -> Tensor | None:
    """Return the trained copy of a module listed in peft's modules_to_save, or None."""
    owner, wrapped, rest = name.partition(".original_module.")
    if not wrapped:
        return None
    wrapper: Any = module.get_submodule(owner)
    if wrapper.disable_adapters:
        return None
    return wrapper.modules_to_save[wrapper.active_adapters[0]].get_parameter(rest)


def _refuse_adapted_ties(module: nn.Module) -> None:
    """Raise if only one side of a tie has an adapter, since merging would change both sides."""
    first: dict[int, str] = {}
    # A tied weight appears under two names with one identity.
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if _ROWS in other and _ROWS in name:
            continue
        if other != name and any(part in f"{other} {name}" for part in _WRAPPED):
            raise TrainingError(
                f"{checkpoint_name(other)} and {checkpoint_name(name)} are one tied weight and "
                "one of them has an adapter. Remove both from tuning.targets, or untie them."
            )
