"""A fixed sample of the trained weights, which shows how far an optimizer step moves them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align.core import distributed

MAX_TENSORS, MAX_ELEMENTS = 128, 256
"""Number of tensors in the sample, and of elements of each; evenly spaced."""


class WeightProbe:
    """Reads the same elements of the trained weights before and after an optimizer step."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, sharded: bool) -> None:
        """Choose the sample.

        Args:
            parameters: the trained weights.
            sharded: whether each rank holds another part of every weight (ZeRO-3).
        """
        num = min(len(parameters), MAX_TENSORS)
        self._parameters = [parameters[i * len(parameters) // num] for i in range(num)]
        self._sharded = sharded

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return a copy of the sampled elements, (N,), that this rank holds."""
        parts = [self._part(parameter) for parameter in self._parameters]
        return torch.cat(parts)

    def _part(self, parameter: Any) -> Tensor:
        """Return the sampled elements of a weight; the same ones however it is sharded."""
        held = (parameter.ds_tensor if self._sharded else parameter).detach().reshape(-1)
        size = parameter.ds_numel if self._sharded else held.numel()
        start = distributed.rank() * held.numel() if self._sharded else 0
        step = max(1, size // MAX_ELEMENTS)
        stop = min(size, step * MAX_ELEMENTS) - start
        return held[-start % step : max(stop, 0) : step].float().to(distributed.device())

    def movement(self, before: Tensor, *, rate: float) -> dict[str, float]:
        """Return how far the sampled weights moved since ``before``; the same on every rank.

        ``update_ratio``: norm of the change over norm of the weights. ``update_per_rate``: largest
        change of an element, in units of the learning rate; about 1 for Adam. ``weight_rms``: root
        mean square of the weights.
        """
        after = self.read()
        change = after - before
        sums = torch.stack([change.square().sum(), after.square().sum()]).double().tolist()
        count, largest = float(len(after)), float(change.abs().max()) if len(change) else 0.0
        if self._sharded:
            # Each rank holds other elements of the sample under ZeRO-3, and all of them otherwise.
            found = distributed.global_sums({"0": sums[0], "1": sums[1], "count": count})
            sums, count = [found["0"], found["1"]], found["count"]
            largest = distributed.global_max(largest)
        return {
            "update_ratio": math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0,
            "update_per_rate": largest / rate if rate else 0.0,
            "weight_rms": math.sqrt(sums[1] / count),
        }
