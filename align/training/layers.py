"""Which layers train at a step, and at what share of the learning rate: a function of the step.

Nothing here is state, so a resumed run needs none. Under ZeRO a parameter that is frozen when the
engine is made never trains afterwards: the Learner gives every parameter to the optimiser and
switches ``requires_grad`` and the rates before each step.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from align.core.errors import TrainingError
from align.recipe.schema import LayersSpec

log = logging.getLogger(__name__)
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_positions|embeddings|wte|wpe)\.")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Give the share of the learning rate of each depth at each step.

    Attributes:
        spec: the recipe's block. num_layers: blocks of the model.
        total_steps: optimiser steps of the stage.
    """

    spec: LayersSpec
    num_layers: int
    total_steps: int

    def depth(self, name: str) -> int:
        """Give a parameter's depth: -1 embeddings, else its layer; the top one for all above."""
        found = _LAYER.search(name)
        if found is not None:
            return int(found.group(1))
        return -1 if _EMBEDDING.search(name) else self.num_layers - 1

    def thaw_step(self, depth: int) -> int | None:
        """Give the first step (from 0) at which a depth trains; None for never."""
        if depth < 0 and self.spec.freeze_embeddings:
            return None
        if 0 <= depth < self.spec.freeze_first:
            return None
        if self.spec.unfreeze is None:
            return 0
        above = self.num_layers - 1 - depth
        if depth < 0:
            above -= self.spec.freeze_first  # the frozen layers take no turn
        step = above * self.spec.unfreeze.every_steps
        return step if step < self.total_steps else None

    def share(self, depth: int, step: int) -> float:
        """Give the share of the learning rate in [0, 1]; 0 is frozen.

        The top layer trains at the full rate and each layer below at ``rate_decay`` of the one
        above it (ULMFiT's head is a layer of its own; here it counts with the top layer).
        """
        first = self.thaw_step(depth)
        if first is None or step < first:
            return 0.0
        return self.spec.rate_decay ** (self.num_layers - 1 - depth)


def plan_layers(spec: LayersSpec, names: Sequence[str], *, total_steps: int) -> LayerPlan:
    """Lay the recipe's block over a model with parameters of these names.

    Raises:
        TrainingError: the model has no such layers, or the block has no effect on it.
    """
    layers = {int(found.group(1)) for name in names if (found := _LAYER.search(name))}
    if not layers:
        raise TrainingError(
            "layers: no parameter of the model belongs to a numbered layer, expected names such "
            f"as 'layers.0.'; found {', '.join(names[:3])} ...; remove the block"
        )
    num = max(layers) + 1
    if spec.freeze_first > num:
        raise TrainingError(
            f"layers.freeze_first: {spec.freeze_first}, but the model has {num} layers"
        )
    plan = LayerPlan(spec, num, total_steps)
    never = [depth for depth in range(-1, num) if plan.thaw_step(depth) is None]
    unmeant = [d for d in never if d >= spec.freeze_first or (d < 0 and not spec.freeze_embeddings)]
    if unmeant:
        assert spec.unfreeze is not None
        log.warning(
            "layers.unfreeze: %d steps with a thaw every %d leave %s frozen to the end",
            total_steps,
            spec.unfreeze.every_steps,
            ", ".join("the embeddings" if d < 0 else f"layer {d}" for d in unmeant),
        )
    return plan


def set_trainable(
    parameters: Sequence[tuple[int, nn.Parameter]], plan: LayerPlan, step: int
) -> None:
    """Switch each (depth, parameter) on or off; a frozen one has no gradient in the clip norm."""
    for depth, parameter in parameters:
        parameter.requires_grad_(plan.share(depth, step) > 0.0)
