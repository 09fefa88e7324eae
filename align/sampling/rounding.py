"""Measure how much rounding alone changes a model's log-probabilities, to judge a difference.

Engine and trainer use different kernels, which add in a different order and round in different
places. The effect depends on the model, its dtype and the text, so no fixed bound in nats fits. It
is measured instead: the model is compared with itself while the inputs of its matrix products are
moved by half a unit in the last place, up or down at random. On SmolLM2-135M, the mean gap between
vLLM and the trainer is 0.8 to 2.1 times this, in float32 (2e-6 to 7e-6 nats) and in bfloat16 (0.04
to 0.06).

A cache in 8-bit floats rounds keys and values, whose effect is much larger. It is measured in the
same way: the model is compared with itself while its attention gets rounded keys and values.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from align.core.errors import TrainingError
from align.models.attention import PACKED, packed_attention
from align.models.decoder import packs

ENGINE_LIMIT = 5.0
"""Largest ratio of an engine's gap to the trainer's own rounding: every layer has other kernels."""

SAME_LIMIT = 2.0
"""Largest ratio for two runs of one implementation: rows packed and alone."""

FLOOR = 2e-6
"""Rounding of a log-probability itself, in nats: one unit of float32 for logits of 16 to 32, since
the logit and the logarithm of the sum are each rounded by half a unit. A model that is sure of its
tokens has such logits, and what moves the inputs of its layers hardly moves their probabilities."""


@contextlib.contextmanager
def rounded_otherwise(model: nn.Module, *, seed: int = 0) -> Iterator[None]:
    """Round the inputs of every linear layer to a neighboring value, inside the block."""
    from transformers.pytorch_utils import Conv1D

    generators: dict[torch.device, torch.Generator] = {}

    def disturb(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        # A fixed seed: the measured rounding is the same in every run.
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(seed)
        sign = torch.randint(0, 2, x.shape, generator=generators[x.device], device=x.device)
        # eps / 2 is the relative size of half a unit in the last place.
        step = (2.0 * sign - 1.0) * torch.finfo(x.dtype).eps / 2.0
        return ((x.float() * (1.0 + step)).to(x.dtype), *args[1:])

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    handles = [layer.register_forward_pre_hook(disturb) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def rounded_cache(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Round keys and values to ``dtype`` in the attention of packed rows, inside the block.

    Args:
        model: the policy; its attention must be that of packed rows. dtype: None rounds nothing.

    Raises:
        TrainingError: the model has an attention of its own, whose rounding cannot be measured.
    """
    if dtype is None:
        yield
        return
    if not any(packs(m) for m in model.modules() if isinstance(m, PreTrainedModel)):
        raise TrainingError(
            "sampling.cache_dtype: this model has an attention of its own, so the effect of a "
            "rounded cache cannot be measured, and a wrong engine would not be noticed. Remove the "
            "key"
        )

    def rounded(*given: Any, **options: Any) -> tuple[Tensor, None]:
        module, query, key, value, mask = given
        key, value = (x.to(dtype).to(x.dtype) for x in (key, value))
        return packed_attention(module, query, key, value, mask, **options)

    AttentionInterface.register(PACKED, rounded)
    try:
        yield
    finally:
        AttentionInterface.register(PACKED, packed_attention)


def excess(gap: Tensor, rounding: Tensor) -> float:
    """Return the ratio of a difference of log-probabilities to the effect of rounding.

    Means and 90 % quantiles are compared, not maxima, which have a heavy tail and grow with the
    number of tokens.

    Args:
        gap: differences of single tokens, in nats.
        rounding: differences of the same tokens that rounding alone causes, in nats.

    Returns:
        The larger of the two quotients; infinite if a difference is not finite.
    """
    gap, rounding = gap.detach().abs().double(), rounding.detach().abs().double()
    if not torch.isfinite(gap).all():
        return math.inf
    # The floor keeps a model without rounding error from making every gap infinite.
    mean = max(float(rounding.mean()), FLOOR)
    tail = max(float(rounding.quantile(0.9)), mean)
    return max(float(gap.mean()) / mean, float(gap.quantile(0.9)) / tail)
