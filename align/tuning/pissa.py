"""Convert a PiSSA adapter to plain LoRA on the weights from which the stage started.

PiSSA moves the leading directions of a weight into its adapter and trains them: W = (W - B0 A0) +
B A. Relative to the original W, the change is B A - B0 A0, a LoRA of twice the rank.

Reference: arXiv:2404.02948 section 5.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel


def remember_start(model: nn.Module) -> None:
    """Store B0 and A0 in each adapter as buffers that are not part of a checkpoint."""
    for layer in _lora_layers(model):
        for part, holder in (("A", layer.lora_A), ("B", layer.lora_B)):
            start = holder["default"].weight.detach().clone()
            layer.register_buffer(f"pissa_{part}0", start, persistent=False)


def is_pissa(model: nn.Module) -> bool:
    """Return whether ``model`` was wrapped with PiSSA in this process."""
    return any(hasattr(layer, "pissa_A0") for layer in _lora_layers(model))


def _lora_layers(model: nn.Module) -> list[Any]:
    """Return the layers that have low-rank updates."""
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def as_lora(model: "PeftModel", state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """Return a PiSSA adapter's tensors and configuration as a LoRA of twice the rank."""
    # Rows of new tokens are not a low-rank update, so they stay.
    found = {name: x for name, x in state.items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if not hasattr(layer, "pissa_A0"):
            continue
        key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        a, b = state[key_a], state[key_b]
        # B A - B0 A0 = [B, -B0] [A; A0]: twice the rank.
        found[key_a] = torch.cat([a, layer.pissa_A0.to(a)], 0)
        found[key_b] = torch.cat([b, -layer.pissa_B0.to(b)], 1)
    config: Any = copy.deepcopy(model.peft_config["default"])
    # Both doubled, so the scale alpha / r stays the same.
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.init_lora_weights = True
    return found, config
