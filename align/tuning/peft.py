"""LoRA through peft: wrap before training, give back merged weights after it."""

from typing import Any

from torch import nn

from align.recipe.schema import LoraSpec


def add_lora(model: nn.Module, lora: LoraSpec) -> nn.Module:
    """Freeze ``model`` and add trainable low-rank updates to its linear layers.

    At the start B = 0, so the policy equals the model it began from; with the adapter off it stays
    that model, which makes it the legal reference of its own stage.
    """
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
    )
    return peft.get_peft_model(model, config)


def is_lora(model: nn.Module) -> bool:
    """Say whether ``model`` carries an adapter."""
    return hasattr(model, "peft_config")


def adapter_state(model: Any) -> dict[str, Any]:
    """Give the adapter's own tensors by peft's names."""
    import peft

    return peft.get_peft_model_state_dict(model)
