"""Reward functions: learned scorers, rules and mathematics; nothing here imports ``align``.

``build_reward(spec)`` turns the plain dict of one reward in a recipe into a callable with TRL's
convention, so that the same reward works in PPO, GRPO, evaluation and any TRL trainer. To add a
reward, write a class in ``specs.py`` and a builder, and register it in ``BUILDERS``.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from reward_models.base import RewardFunction
from reward_models.specs import RewardBase, read_spec

BUILDERS = {
    "scalar": "learned.build_scalar",
    "process": "process.build_process",
    "remote": "remote.build_remote",
    "judge": "judging.build_judge",
    "exact_match": "rules.exact_match",
    "regex": "rules.regex_found",
    "format": "rules.format_matches",
    "length": "rules.length",
    "repetition": "rules.repetition",
    "refusal": "refusals.refusal",
    "math": "math.build_math",
    "python": "own.build_python",
    "ensemble": "ensemble.build_ensemble",
}
"""Builder of each reward kind in this package, imported on use since learned scorers need torch."""


def build_reward(spec: Mapping[str, Any] | RewardBase) -> RewardFunction:
    """Build the reward that one entry of a recipe describes.

    Args:
        spec: the entry, as a plain dict or already validated; ``model`` of a learned reward is the
            folder that contains the scorer. Missing keys use the defaults of
            ``reward_models.specs``.

    Returns:
        The reward, with ``name`` (default: its kind), ``weight`` and ``invalid``.

    Raises:
        ValueError: an unknown kind or key, or an invalid setting.
    """
    checked = spec if isinstance(spec, RewardBase) else read_spec(spec)
    module, _, builder = BUILDERS[checked.kind].rpartition(".")
    return getattr(import_module(f"reward_models.{module}"), builder)(checked)


__all__ = ["BUILDERS", "RewardFunction", "build_reward"]
