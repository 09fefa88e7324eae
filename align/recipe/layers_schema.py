"""Schema of the layers block: which layers of the policy train when, and how fast."""

from typing import Annotated

from pydantic import Field, model_validator

from align.recipe.parts import Count, Spec

OUTSIDE = ("head", "prefix", "prompt", "ptuning")
"""Tuning methods that train nothing inside a layer."""


class UnfreezeSpec(Spec):
    """Begin with the top layer and thaw the next one below it every so often."""

    every_steps: Count
    """Optimiser steps between two thaws."""


class LayersSpec(Spec):
    """Freeze layers, thaw them from the top, train lower ones more slowly (arXiv:1801.06146).

    Layers are the decoder's blocks, counted from 0 at the bottom. What stands above them (final
    norm, head, an adapter outside of the blocks) counts with the top layer; the embeddings, and
    with them a tied head, lie below layer 0.
    """

    freeze_first: Annotated[int, Field(ge=0)] = 0
    """Lowest layers that never train."""
    freeze_embeddings: bool = False
    unfreeze: UnfreezeSpec | None = None
    rate_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Learning rate of a layer as a share of that of the layer above it."""

    @model_validator(mode="after")
    def _has_effect(self) -> "LayersSpec":
        if self == LayersSpec.model_construct():
            raise ValueError("the block changes nothing; give one of its keys, or remove it")
        return self


def refuse_outside(layers: LayersSpec | None, method: str) -> None:
    """Raise ValueError where nothing that trains belongs to what the block speaks of."""
    if layers is None:
        return
    if method in OUTSIDE:
        raise ValueError(
            f"'layers' has no effect with tuning.method {method}, which trains nothing inside a "
            "layer; remove it, or choose a method such as lora"
        )
    if layers.freeze_embeddings and method != "full":
        raise ValueError(
            f"'layers.freeze_embeddings' has no effect with tuning.method {method}, which leaves "
            "the embeddings as they are; remove it"
        )
