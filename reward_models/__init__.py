"""Reward functions: learned scorers, rules and mathematics; nothing here imports ``align``.

``build_reward(spec)`` turns the plain dict of one reward in a recipe into a callable with TRL's
convention, so that the same reward works in PPO, GRPO, evaluation and any TRL trainer. To add a
reward, write a subclass of ``RewardSpec`` that names its builder, and the builder.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from reward_models.base import RewardFunction
from reward_models.specs import RewardSpec, read_spec


def build_reward(spec: Mapping[str, Any] | RewardSpec) -> RewardFunction:
    """Build the reward that one entry of a recipe describes.

    Args:
        spec: the entry, as a plain dict or already validated; ``model`` of a learned reward is the
            folder that contains the scorer. Missing keys use the defaults of
            ``reward_models.specs``.

    Returns:
        The reward, with ``name`` (default: its kind), ``weight``, ``prefill`` and ``invalid``.

    Raises:
        ValueError: an unknown kind or key, or an invalid setting.
    """
    checked = spec if isinstance(spec, RewardSpec) else read_spec(spec)
    module, _, builder = checked.builder.partition(":")
    reward = getattr(import_module(module), builder)(checked)
    reward.prefill = checked.prefill
    return reward


__all__ = ["RewardFunction", "build_reward"]
