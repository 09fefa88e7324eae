"""Layer freezing, gradual unfreezing and per-layer learning rates as functions of the step.

There is no state, so nothing needs to be restored on resume. Under ZeRO, a parameter that is frozen
when the engine is created never trains afterwards. The Learner therefore gives every parameter to
the optimizer and switches ``requires_grad`` and the rates before each step.
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
    """Learning-rate factor of each layer at each step.

    Attributes:
        spec: the recipe's block. num_layers: blocks of the model.
        total_steps: optimizer steps of the stage.
    """

    spec: LayersSpec
    num_layers: int
    total_steps: int

    def depth(self, name: str) -> int:
        """Return a parameter's layer number: -1 for embeddings, the top layer for all above it."""
        found = _LAYER.search(name)
        if found is not None:
            return int(found.group(1))
        return -1 if _EMBEDDING.search(name) else self.num_layers - 1

    def thaw_step(self, depth: int) -> int | None:
        """Return the first step (from 0) at which a layer trains; None if it never does."""
        if depth < 0 and self.spec.freeze_embeddings:
            return None
        if 0 <= depth < self.spec.freeze_first:
            return None
        if self.spec.unfreeze is None:
            return 0
        # The top layer trains from the start; each one below waits for its turn.
        above = self.num_layers - 1 - depth
        if depth < 0:
            above -= self.spec.freeze_first  # the frozen layers take no turn
        step = above * self.spec.unfreeze.every_steps
        return step if step < self.total_steps else None

    def share(self, depth: int, step: int) -> float:
        """Return the learning-rate factor of a layer, in [0, 1]; 0 means frozen.

        The top layer trains at the full rate, and each layer below at ``rate_decay`` times the
        rate of the layer above it. Deviation: ULMFiT treats the head as a layer of its own; here
        it belongs to the top layer.
        """
        first = self.thaw_step(depth)
        if first is None or step < first:
            return 0.0
        return self.spec.rate_decay ** (self.num_layers - 1 - depth)


def plan_layers(spec: LayersSpec, names: Sequence[str], *, total_steps: int) -> LayerPlan:
    """Return the layer plan of a model with parameters of these names.

    Raises:
        TrainingError: the model has no such layers, or the block has no effect on it.
    """
    layers = {int(found.group(1)) for name in names if (found := _LAYER.search(name))}
    if not layers:
        raise TrainingError(
            "layers: no parameter of the model belongs to a numbered layer; expected names such "
            f"as 'layers.0.', found {', '.join(names[:3])} ... Remove the 'layers' block"
        )
    num = max(layers) + 1
    if spec.freeze_first > num:
        raise TrainingError(
            f"layers.freeze_first: {spec.freeze_first}, but the model has {num} layers. "
            f"Set it to {num} or less"
        )
    plan = LayerPlan(spec, num, total_steps)
    # A layer that never trains although the recipe did not ask to freeze it is a likely mistake.
    never = [depth for depth in range(-1, num) if plan.thaw_step(depth) is None]
    unmeant = [d for d in never if d >= spec.freeze_first or (d < 0 and not spec.freeze_embeddings)]
    if unmeant:
        assert spec.unfreeze is not None
        log.warning(
            "layers.unfreeze: %d steps with one unfreezing every %d leave %s frozen to the end",
            total_steps,
            spec.unfreeze.every_steps,
            ", ".join("the embeddings" if d < 0 else f"layer {d}" for d in unmeant),
        )
    return plan


def set_trainable(
    parameters: Sequence[tuple[int, nn.Parameter]], plan: LayerPlan, step: int
) -> None:
    """Freeze or unfreeze each (layer, parameter); frozen ones do not enter the gradient norm."""
    for depth, parameter in parameters:
        parameter.requires_grad_(plan.share(depth, step) > 0.0)
