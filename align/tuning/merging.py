"""Compute merged weights of adapted layers without changing the model."""

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.tuning.inserted import InsertedLayer
from align.tuning.virtual import VirtualTokens

if TYPE_CHECKING:
    from peft import PeftModel


def has_adapter(model: nn.Module) -> bool:
    """Return whether ``model`` has an adapter."""
    return hasattr(model, "peft_config")


def merges(model: nn.Module) -> bool:
    """Return whether all of a model's adapters can be merged into its weights."""
    if isinstance(model, VirtualTokens):
        return False
    return not any(isinstance(m, InsertedLayer) for m in model.modules())


def base_parameters(model: "PeftModel") -> Iterator[Tensor]:
    """Yield the parameters of an adapted model that do not belong to its adapter."""
    base = model.get_base_model()
    owners = adapted_layers(base)
    inserted = {id(p) for layer in owners.values() for p in _own_parameters(layer)}
    yield from (p for p in base.parameters() if id(p) not in inserted)


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters of an adapted model by name, even if temporarily frozen."""
    own = {id(p) for layer in adapted_layers(model).values() for p in _own_parameters(layer)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or id(parameter) in own:
            yield name, parameter


def _own_parameters(layer: nn.Module) -> Iterator[Tensor]:
    for name, p in layer.named_parameters():
        if not name.startswith("base_layer."):
            yield p


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


@torch.no_grad()
def merged_parameters(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of an adapted layer with its active adapters merged.

    The sum is computed in float32 on copies and rounded by ``keep_update``; the layer is not
    changed. 4-bit weights are dequantized before the update is added, which equals the layer's
    computation.
    """
    base = layer.get_base_layer()
    if is_quantized(getattr(base, "weight", None)):
        # 4-bit: dequantize to float32, then add each update; the result is no longer quantized.
        weight = dequantized(base.weight)
        for adapter in () if layer.disable_adapters else layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).float()
        yield "weight", weight
        if base.bias is not None:
            yield "bias", base.bias.detach()
        return
    # Modules inside it, such as the statistics of Ernie's routers, may have adapters of their own.
    inside = adapted_layers(base)
    parameters = {
        name: p
        for name, p in base.named_parameters()
        if not any(name.startswith(f"{place}.") for place in inside)
    }
    # peft's merge changes the weights in place: swap in float32 copies and restore afterwards.
    kept = {name: p.data for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.data = p.data.float().clone()
        if not layer.disable_adapters and not isinstance(layer, InsertedLayer):
            for part in _nested(layer):
                part.merge()
        found = {name: keep_update(p.data, kept[name].dtype) for name, p in parameters.items()}
    finally:
        for name, p in parameters.items():
            p.data = kept[name]
        # peft noted the merge; without this, the layer would skip its adapter from now on.
        for part in _nested(layer):
            part.merged_adapters.clear()
    yield from found.items()


def _nested(layer: Any) -> Iterator[Any]:
    """Yield an adapted layer and those inside it: each parameter of a module has one of its own."""
    while hasattr(layer, "merged_adapters"):
        yield layer
        layer = layer.base_layer


def keep_update(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a weight plus its update to ``dtype`` so that small updates survive on average.

    In bfloat16, most updates of an adapter are smaller than half the distance between neighboring
    values of the weight. Rounding to nearest would return the old weight and thus a different
    model. Here, a number between two neighbors is rounded up with a probability equal to its
    relative distance from the lower one. Each position has a fixed pseudo-random threshold, so that
    equal sums are rounded alike and a weight without update is unchanged.

    Args:
        total: the sum in float32.
        dtype: dtype of the result; float32 is returned unchanged.

    Reference:
        Stochastic rounding, arXiv:1502.02551 eq. 2, with thresholds that are drawn once.
    """
    if dtype != torch.bfloat16:
        return total.to(dtype)
    bits = total.contiguous().view(torch.int32).flatten()
    pattern = _thresholds(total.device)
    repeated = pattern.repeat(-(-len(bits) // len(pattern)))[: len(bits)]
    # bfloat16 is the upper half of float32, so a carry from the threshold rounds up.
    upper = (bits + repeated) & -(1 << 16)
    rounded = upper.view(torch.float32).to(torch.bfloat16).view(total.shape)
    return torch.where(total.isfinite(), rounded, total.to(torch.bfloat16))


@cache
def _thresholds(device: torch.device) -> Tensor:
    """Return random thresholds for the lower 16 bits; their number is prime so that rows differ."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 1 << 16, (65_537,), generator=generator, dtype=torch.int32)
    return drawn.to(device)


def is_quantized(weight: Tensor | None) -> bool:
    """Return whether a weight is stored in 4 bits."""
    return hasattr(weight, "quant_state")


def dequantized(weight: Any) -> Tensor:
    """Return a 4-bit weight dequantized to float32."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float()
