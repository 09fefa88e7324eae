"""Losses, KL estimates and masked reductions as pure functions on tensors.

The names in ``__all__`` are stable: their modules may change, ``align.losses.dpo_loss`` does not.
Each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.losses.kl import AdaptiveKL, FixedKL, corrected_kl, kl_estimate
    from align.losses.policy import (
        cispo_policy_loss,
        clipped_policy_loss,
        gspo_policy_loss,
        importance_weights,
        policy_ratio,
    )
    from align.losses.preference import (
        PreferenceLoss,
        bradley_terry_loss,
        dpo_loss,
        kto_loss,
        orpo_loss,
        simpo_loss,
    )
    from align.losses.reduce import masked_whiten, segment_mean, segment_sum, token_mean
    from align.losses.scorer import answer_loss, step_loss, tie_loss
    from align.losses.supervised import class_loss, nll
    from align.losses.value import clipped_value_loss

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "PreferenceLoss",
    "answer_loss",
    "bradley_terry_loss",
    "cispo_policy_loss",
    "class_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "corrected_kl",
    "dpo_loss",
    "gspo_policy_loss",
    "importance_weights",
    "kl_estimate",
    "kto_loss",
    "masked_whiten",
    "nll",
    "orpo_loss",
    "policy_ratio",
    "segment_mean",
    "segment_sum",
    "simpo_loss",
    "step_loss",
    "tie_loss",
    "token_mean",
]

_HOMES = {
    "kl": "AdaptiveKL FixedKL corrected_kl kl_estimate",
    "policy": "cispo_policy_loss clipped_policy_loss gspo_policy_loss importance_weights "
    "policy_ratio",
    "preference": "PreferenceLoss bradley_terry_loss dpo_loss kto_loss orpo_loss simpo_loss",
    "reduce": "masked_whiten segment_mean segment_sum token_mean",
    "scorer": "answer_loss step_loss tie_loss",
    "supervised": "class_loss nll",
    "value": "clipped_value_loss",
}


if not TYPE_CHECKING:  # With it, a type checker would accept every name.

    def __getattr__(name: str) -> Any:
        for module, names in _HOMES.items():
            if name in names.split():
                return getattr(import_module(f"align.losses.{module}"), name)
        raise AttributeError(f"module 'align.losses' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
