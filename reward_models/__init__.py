"""Reward functions: learned scorers, rules and mathematics; nothing here imports ``align``.

``build_reward(spec)`` turns the plain dict of one reward in a recipe into a callable with TRL's
convention, so that the same reward serves PPO, GRPO, evaluation and any TRL trainer.
"""

from collections.abc import Callable, Mapping
from typing import Any

from reward_models.base import RewardFunction


def _scalar(spec: Mapping[str, Any]) -> RewardFunction:
    from reward_models import learned

    return learned.build_scalar(spec)


def _process(spec: Mapping[str, Any]) -> RewardFunction:
    from reward_models import process

    return process.build_process(spec)


def _remote(spec: Mapping[str, Any]) -> RewardFunction:
    from reward_models import remote

    return remote.build_remote(spec)


def _judge(spec: Mapping[str, Any]) -> RewardFunction:
    from reward_models import judging

    return judging.build_judge(spec)


def _math(spec: Mapping[str, Any]) -> RewardFunction:
    from reward_models import math

    return math.build_math(spec)


def _ensemble(spec: Mapping[str, Any]) -> RewardFunction:
    from reward_models import ensemble

    return ensemble.build_ensemble(spec, build_reward)


def _refusal(spec: Mapping[str, Any]) -> RewardFunction:
    from reward_models import refusals

    return refusals.refusal(spec)


def _rule(kind: str) -> Callable[[Mapping[str, Any]], RewardFunction]:
    def build(spec: Mapping[str, Any]) -> RewardFunction:
        from reward_models import rules

        return rules.RULES[kind](spec)

    return build


REWARDS: dict[str, Callable[[Mapping[str, Any]], RewardFunction]] = {
    "scalar": _scalar,
    "process": _process,
    "remote": _remote,
    "judge": _judge,
    "exact_match": _rule("exact_match"),
    "regex": _rule("regex"),
    "format": _rule("format"),
    "length": _rule("length"),
    "repetition": _rule("repetition"),
    "refusal": _refusal,
    "math": _math,
    "ensemble": _ensemble,
}
"""Reward kind to its builder; the builders import torch only where they need it."""


def build_reward(spec: Mapping[str, Any]) -> RewardFunction:
    """Build the reward that one entry of a recipe describes.

    Args:
        spec: the entry as a plain dict (``RewardSpec.model_dump()``); ``model`` of a scalar reward
            is already the directory that holds the scorer. Absent optional keys take the
            defaults of the recipe schema.

    Returns:
        The reward, with ``name`` (default: its kind), ``weight`` and ``invalid``.

    Raises:
        ValueError: on an unknown kind or a setting that cannot work.
    """
    kind = spec.get("kind")
    if kind not in REWARDS:
        raise ValueError(f"reward kind {kind!r} is unknown; use one of {', '.join(REWARDS)}")
    return REWARDS[kind](spec)


__all__ = ["REWARDS", "RewardFunction", "build_reward"]
