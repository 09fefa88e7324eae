"""Rewards by name, for ``rewards=[align.rewards.math(), ...]`` and for scoring in Python.

Each name makes the settings of one kind of reward; the keys are those of docs/recipe-keys.md.
``build`` turns settings into a function ``f(prompts=..., completions=..., **columns)``.
"""

from functools import partial
from typing import Any

from reward_models import build_reward as build
from reward_models.specs import (
    CodeSpec,
    EnsembleSpec,
    ExactMatchSpec,
    FormatSpec,
    JudgeSpec,
    LengthSpec,
    MathSpec,
    MetricSpec,
    ProcessSpec,
    PythonSpec,
    RefusalSpec,
    RegexSpec,
    RemoteSpec,
    RepetitionSpec,
    RewardSpec,
    ScalarSpec,
)

__all__ = [
    "RewardSpec",
    "build",
    "code",
    "ensemble",
    "exact_match",
    "format",
    "judge",
    "length",
    "math",
    "metric",
    "process",
    "python",
    "refusal",
    "regex",
    "remote",
    "repetition",
    "scalar",
]

code = partial(CodeSpec, kind="code")
ensemble = partial(EnsembleSpec, kind="ensemble")
exact_match = partial(ExactMatchSpec, kind="exact_match")
format = partial(FormatSpec, kind="format")
judge = partial(JudgeSpec, kind="judge")
length = partial(LengthSpec, kind="length")
math = partial(MathSpec, kind="math")
metric = partial(MetricSpec, kind="metric")
process = partial(ProcessSpec, kind="process")
python = partial(PythonSpec, kind="python")
refusal = partial(RefusalSpec, kind="refusal")
regex = partial(RegexSpec, kind="regex")
remote = partial(RemoteSpec, kind="remote")
repetition = partial(RepetitionSpec, kind="repetition")
scalar = partial(ScalarSpec, kind="scalar")


def __getattr__(name: str) -> Any:
    """Return the settings of a kind of reward that an extension defines."""
    if name not in RewardSpec.variants:
        raise AttributeError(f"module 'align.rewards' has no attribute '{name}'")
    return partial(RewardSpec.variants[name], kind=name)
