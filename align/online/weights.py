"""From trainer to sampler: full weights under checkpoint names, and the proof of arrival."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from align.core.errors import TrainingError
from align.online.engine import RolloutEngine

PUSH_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.35}
"""Largest difference of one token's log-probability, in nats, between engine and trainer."""

_WRAPPED = ("base_layer.", "original_module.")


def full_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight in full under its checkpoint name, one at a time.

    Works on a plain model, on one under ZeRO 0-3 and on one with LoRA through peft: the low-rank
    update is added to a copy, ``W + scaling * B A``, and the model stays as it is. A tied weight
    comes once, under its first name. Under ZeRO-3 every rank must take all weights, in step.

    Args:
        module: the Hugging Face or peft model (not the DeepSpeed engine around it).

    Yields:
        Name and detached tensor; under ZeRO-3 and LoRA a copy, else the parameter's own memory.

    Raises:
        TrainingError: an adapter has a part that cannot be added to the weight (DoRA, a bias).
    """
    adapters = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    for layer_name, layer in adapters.items():
        _refuse_unmergeable(layer_name, layer)
    _refuse_adapted_ties(module)
    for name, parameter in module.named_parameters():
        if _is_adapter(name):
            continue
        owner = name.removesuffix(".base_layer.weight")
        layer = adapters.get(owner) if owner != name else None
        saved = _saved_copy(module, name)
        yield checkpoint_name(name), _full(parameter if saved is None else saved, layer)


def checkpoint_name(name: str) -> str:
    """Strip what peft adds to a parameter's name.

    ``base_model.model.model.norm.weight`` becomes ``model.norm.weight``.
    """
    name = name.removeprefix("base_model.model.")
    for part in _WRAPPED:
        name = name.replace(part, "")
    return name


def check_push(
    engine: RolloutEngine,
    probe_ids: Sequence[int],
    trainer_logprobs: Sequence[float],
    *,
    dtype: Literal["float32", "bfloat16"],
) -> float:
    """Prove that the engine answers with the trainer's weights.

    The probabilities of given tokens pass through the embedding, every layer and the head, so a
    head that stayed on old weights shows, which the most likely token would not.

    Args:
        engine: the engine after ``load_weights``.
        probe_ids: any token sequence of two tokens or more.
        trainer_logprobs: the trainer's log-probabilities, temperature 1, of the last
            ``len(trainer_logprobs)`` tokens of ``probe_ids``, in nats.
        dtype: number format of engine and trainer; sets the bound.

    Returns:
        The largest difference found, in nats.

    Raises:
        TrainingError: the engine's numbers are not the trainer's; names the weights' version.
    """
    assert 0 < len(trainer_logprobs) < len(probe_ids), (len(trainer_logprobs), len(probe_ids))
    found = engine.token_logprobs(probe_ids)[-len(trainer_logprobs) :]
    differences = [abs(a - b) for a, b in zip(found, trainer_logprobs, strict=True)]
    # max() would pass over a NaN that is not the first.
    worst = max(d if math.isfinite(d) else math.inf for d in differences)
    bound = PUSH_TOLERANCE[dtype]
    if worst > bound:
        raise TrainingError(
            f"weights version {engine.version}: the {engine.name} engine does not answer with the "
            f"trainer's weights: log-probabilities differ by {worst:.4g} nats, expected at most "
            f"{bound} in {dtype}; the push did not reach every layer (report it with the library "
            "versions of 'align doctor', go on with sampling.engine: hf)"
        )
    return worst


def _full(parameter: Tensor, layer: Any | None) -> Tensor:
    """Give the whole weight, with the layer's low-rank updates added to a copy of it."""
    parts = [parameter]
    if layer is not None:
        parts += list(layer.lora_A.parameters()) + list(layer.lora_B.parameters())
        parts += list(layer.lora_embedding_A.values()) + list(layer.lora_embedding_B.values())
    with torch.no_grad(), gathered(parts):
        weight = parameter.detach()
        if layer is not None:
            return _merged(weight, layer)
        # Gathered memory is freed on leaving; a loader may keep the tensor longer.
        return weight.clone() if hasattr(parameter, "ds_id") else weight


def _merged(weight: Tensor, layer: Any) -> Tensor:
    merged = weight.float().clone()
    if not layer.disable_adapters:
        for adapter in layer.active_adapters:
            if adapter in layer.scaling and adapter not in layer.merged_adapters:
                merged += layer.get_delta_weight(adapter).float()
    return merged.to(weight.dtype)


@contextlib.contextmanager
def gathered(parameters: list[Tensor]) -> Iterator[None]:
    """Hold ZeRO-3 parameters whole inside the block; nothing to do for others."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _saved_copy(module: nn.Module, name: str) -> Tensor | None:
    """Find the trained copy that stands in for a module listed in peft's modules_to_save."""
    owner, wrapped, rest = name.partition(".original_module.")
    if not wrapped:
        return None
    wrapper: Any = module.get_submodule(owner)
    if wrapper.disable_adapters:
        return None
    return wrapper.modules_to_save[wrapper.active_adapters[0]].get_parameter(rest)


def _refuse_adapted_ties(module: nn.Module) -> None:
    """Refuse an adapter on one side of a tie: merged into the shared weight it changes both."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and any(part in f"{other} {name}" for part in _WRAPPED):
            raise TrainingError(
                f"{checkpoint_name(other)} and {checkpoint_name(name)} are one tied weight and "
                "one of them has an adapter; leave both out of tuning.targets, or untie them"
            )


def _refuse_unmergeable(name: str, layer: Any) -> None:
    reason = None
    if len(layer.lora_magnitude_vector):
        reason = "DoRA's magnitude"
    elif any(layer.lora_bias.values()):
        reason = "a bias of its own"
    if reason is not None:
        raise TrainingError(
            f"{name}: its adapter has {reason}, which cannot be pushed to the sampler; "
            "train plain LoRA"
        )
