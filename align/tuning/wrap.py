"""Wrap a model by a tuning spec: what is frozen, what is added, what is trained."""

from typing import Any

from torch import nn

from align.core.errors import TrainingError
from align.recipe.tuning_schema import FullTuning, HeadTuning, LoraTuning, TuningSpec


def add_tuner(model: nn.Module, tuning: TuningSpec) -> nn.Module:
    """Freeze ``model`` and add what ``tuning`` trains; ``full`` gives the model back as it is.

    LoRA starts with B = 0, so the policy equals the model it began from; with the adapter off it
    stays that model, which makes it the legal reference of its own stage.
    """
    if isinstance(tuning, FullTuning):
        return model
    if isinstance(tuning, HeadTuning):
        return model.requires_grad_(False)
    if not isinstance(tuning, LoraTuning):
        raise TrainingError(f"tuning.method {tuning.method} is not wired up yet; use lora")
    import peft

    config = peft.LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=tuning.targets if isinstance(tuning.targets, str) else list(tuning.targets),
        use_rslora=tuning.method == "rslora",
        use_dora=tuning.method == "dora",
    )
    return peft.get_peft_model(model, config)


def has_adapter(model: nn.Module) -> bool:
    """Say whether ``model`` carries an adapter."""
    return hasattr(model, "peft_config")


def adapter_state(model: Any) -> dict[str, Any]:
    """Give the adapter's own tensors by peft's names."""
    import peft

    return peft.get_peft_model_state_dict(model)
