"""Online algorithms without a critic as bundles of options: one entry each.

An algorithm is a named set of defaults for a ``kind: grpo`` stage; every option can still be given
in the recipe, and ``align show`` prints the whole set. docs/algorithms.md has formulas, deviations
and curves. Coefficients of KL are moderate ones of ours: the papers tune them to the task.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

AlgorithmName = Literal[
    "grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "reinforce++-baseline", "gspo", "cispo",
    "remax",
]  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv:2402.03300. The paper averages each answer first (aggregation: sequence) and has
    # kl: {coef: 0.04}; without KL and over tokens is how it is used since.
    "grpo": {},
    # arXiv:2503.20783: no division by the standard deviation nor by the answer's length.
    "dr_grpo": {"scale": "none", "aggregation": "constant"},
    # arXiv:2503.14476: clip-higher, token loss, soft overlong punishment, dynamic sampling.
    "dapo": {
        "clip": {"low": 0.2, "high": 0.28},
        "aggregation": "token",
        "dynamic_sampling": True,
        "overlong": {"buffer_frac": 0.2},
    },
    # arXiv:2402.14740: REINFORCE against the mean of the other answers.
    "rloo": {
        "estimator": "leave_one_out",
        "scale": "none",
        "aggregation": "sequence_sum",
        "kl": {"coef": 0.05, "place": "reward", "estimator": "k1"},
    },
    # arXiv:2501.03262: KL in the reward, reward to go, normalised over the whole batch.
    "reinforce++": {
        "estimator": "reward_to_go",
        "scale": "batch",
        "group_size": 1,
        "kl": {"coef": 0.01, "place": "reward", "estimator": "k1"},
    },
    # The same paper: minus the group's mean, over the batch's standard deviation, k2 as a loss.
    "reinforce++-baseline": {
        "scale": "batch",
        "kl": {"coef": 0.01, "place": "loss", "estimator": "k2"},
    },
    # arXiv:2507.18071: one ratio per answer, the geometric mean over its tokens.
    "gspo": {
        "objective": "gspo",
        "clip": {"low": 3e-4, "high": 4e-4},
        "aggregation": "sequence",
    },
    # arXiv:2506.13585: the weight is clipped, above only, and never the gradient.
    "cispo": {"objective": "cispo", "clip": {"low": 1.0, "high": 4.0}, "aggregation": "token"},
    # arXiv:2310.10505: REINFORCE against the score of the greedy answer.
    "remax": {
        "estimator": "greedy",
        "scale": "none",
        "group_size": 1,
        "aggregation": "sequence_sum",
        "kl": {"coef": 0.05, "place": "reward", "estimator": "k1"},
    },
}
assert set(PRESETS) == set(get_args(AlgorithmName))

SCALES = {
    "group_relative": ("std", "batch", "none"),
    "leave_one_out": ("none",),
    "reward_to_go": ("batch",),
    "greedy": ("none",),
}
"""What an estimator's advantages may be divided by."""


def with_preset(given: Any) -> Any:
    """Lay a stage's own options over those of its algorithm; what is no stage passes through."""
    if not isinstance(given, dict):
        return given
    name = given.get("algorithm")
    preset = PRESETS.get(name, {}) if isinstance(name, str) else {}
    return _over(preset, given)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _over(old, value)
        else:
            merged[key] = value
    return merged


def preset_keys(name: str) -> dict[str, str]:
    """Give the dotted keys that an algorithm sets, each with the words for where it comes from."""

    def keys(values: Mapping[str, Any], before: str) -> list[str]:
        found: list[str] = []
        for key, value in values.items():
            here = f"{before}{key}"
            found += keys(value, f"{here}.") if isinstance(value, dict) else [here]
        return found

    return dict.fromkeys(keys(PRESETS[name], ""), f"algorithm: {name}")
