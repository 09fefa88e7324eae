"""Houlsby adapters: a small network after attention and one after the MLP, before the residual.

Each network adds its own skip connection: h + U f(D h). U starts at zero, so the initial model is
unchanged.

Reference: arXiv:1902.00751 section 2.1. Deviations: the layer norms stay frozen; U starts at
    exactly zero instead of near zero; f is GELU.
"""

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from torch import Tensor, nn

from align.tuning.inserted import InsertedModel, register

NAME = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """Projections that are followed by an adapter, and the size of its inner layer."""

    target_modules: list[str] = field(default_factory=list)
    size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME  # pyright: ignore[reportAttributeAccessIssue]


class Bottleneck(nn.Module):
    """Compute U f(D h), in the dtype of h."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        """Return the change to ``hidden`` (B, T, H)."""
        # (B, T, size).
        inner = nn.functional.gelu(self.down(hidden.to(self.down.weight.dtype)))
        return self.up(inner).to(hidden.dtype)


class BottleneckModel(InsertedModel):
    """A model with bottleneck adapters."""

    def build(self, config: BottleneckConfig, width: int) -> nn.Module:
        """Return one adapter network."""
        return Bottleneck(width, config.size)


register(NAME, BottleneckConfig, BottleneckModel)
