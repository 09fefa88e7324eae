"""Reward functions: learned scorers, rules and mathematics; nothing here imports ``align``.

``build_reward(spec)`` turns the plain dict of one reward in a recipe into a callable with TRL's
convention, so that the same reward serves PPO, GRPO, evaluation and any TRL trainer. A further
reward is a class in ``specs.py`` and a builder, named in ``BUILDERS``.
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
"""Reward kind to its builder in this package, imported on use: learned scorers need torch."""


def build_reward(spec: Mapping[str, Any] | RewardBase) -> RewardFunction:
    """Build the reward that one entry of a recipe describes.

    Args:
        spec: the entry, as a plain dict or checked already; ``model`` of a learned reward is the
            folder that holds the scorer. Absent keys take the defaults of ``reward_models.specs``.

    Returns:
        The reward, with ``name`` (default: its kind), ``weight`` and ``invalid``.

    Raises:
        ValueError: on an unknown kind or key, or a setting that cannot work.
    """
    checked = spec if isinstance(spec, RewardBase) else read_spec(spec)
    module, _, builder = BUILDERS[checked.kind].rpartition(".")
    return getattr(import_module(f"reward_models.{module}"), builder)(checked)


__all__ = ["BUILDERS", "RewardFunction", "build_reward"]
