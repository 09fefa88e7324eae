"""Online algorithms as bundles of options: one entry of ``ALGORITHMS`` each.

An algorithm is a named set of defaults for a stage. A recipe can still set every option, and
``align show`` prints the whole set. docs/algorithms.md has formulas, deviations and curves.
The KL coefficients are moderate values chosen for this project; the papers tune them per task.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from align.core.sources import parameters_of
from align.core.text import suggest
from reward_models.specs import FUNCTION


@dataclass(frozen=True, slots=True)
class Algorithm:
    """An online algorithm: how it compares responses, and the defaults of its stage's options.

    Attributes:
        says: formula, edge case and paper, as ``align show`` prints them.
        estimator: advantage estimator; a name of ``align.online.advantages.ESTIMATORS``, or
            ``module:function`` for a function elsewhere.
        needs_critic: True if a value network is trained together with the policy.
        needs_greedy: True if the greedy response to every prompt is sampled and scored, too.
        compares_group: True if the responses to one prompt are compared with each other.
        scales: valid values of the stage's option ``scale``.
        scale: default of the option ``scale``, the divisor of the advantages.
        objective: default of the option ``objective``: clip, gspo, cispo, or ``module:function``
            for a function like ``align.losses.policy.cispo_policy_loss`` elsewhere.
        aggregation: default of the option ``aggregation``.
        options: defaults of further options of the stage.
    """

    estimator: str = "group_relative"
    needs_critic: bool = False
    needs_greedy: bool = False
    compares_group: bool = True
    scales: tuple[str, ...] = ("std", "batch", "none")
    scale: str = "std"
    objective: str = "clip"
    aggregation: str = "token"
    says: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Return the options in which this algorithm differs from plain GRPO."""
        # Only differences from GRPO are laid in, so `align show` names what the algorithm chose.
        names = ("estimator", "scale", "objective", "aggregation")
        own = {n: getattr(self, n) for n in names if getattr(self, n) != getattr(_PLAIN, n)}
        return {**own, **self.options}


PAIR_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "simpo", "orpo")
"""Losses of a dpo stage."""
_PLAIN = Algorithm(
    says="A = (R - group mean) / (group std + 1e-4) in the clipped loss, averaged over tokens; a "
    "group of equal scores has advantage 0 (arXiv:2402.03300, which averages each response first "
    "and has kl: {coef: 0.04}; without KL and over tokens is how it is used since)",
)
ALGORITHMS: dict[str, Algorithm] = {
    "grpo": _PLAIN,
    "dr_grpo": Algorithm(
        scale="none",
        aggregation="constant",
        says="A = R - group mean, summed over tokens and divided by responses x max_new_tokens: "
        "neither the spread of a group nor the length of a response weighs it; a group of equal "
        "scores has advantage 0 (arXiv:2503.20783)",
    ),
    "dapo": Algorithm(
        says="A as in grpo, of R less a penalty of overlong responses; the ratio is clipped to "
        "[0.8, 1.28]; groups of equal scores are drawn again, at most max_draws times "
        "(arXiv:2503.14476)",
        options={
            "clip": {"low": 0.2, "high": 0.28},
            "dynamic_sampling": True,
            "overlong": {"buffer_frac": 0.2},
        },
    ),
    "rloo": Algorithm(
        "leave_one_out",
        says="A = R - KL - mean of the other responses to the prompt, summed over tokens; the only "
        "valid response of a group has advantage 0 (arXiv:2402.14740)",
        scales=("none",),
        scale="none",
        aggregation="sequence_sum",
        options={"kl": {"coef": 0.05, "place": "reward", "estimator": "k1"}},
    ),
    "reinforce++": Algorithm(
        "reward_to_go",
        says="A of a token = R less the KL from that token on, whitened over the batch of all "
        "ranks; nothing is compared within a group, so one response to a prompt is enough "
        "(arXiv:2501.03262)",
        compares_group=False,
        scales=("batch",),
        scale="batch",
        options={
            "group_size": 1,
            "kl": {"coef": 0.01, "place": "reward", "estimator": "k1"},
        },
    ),
    "reinforce++-baseline": Algorithm(
        says="A = (R - group mean) / std over the whole batch, and k2 to the reference as a loss; "
        "a group of equal scores has advantage 0 (arXiv:2501.03262)",
        scale="batch",
        options={"kl": {"coef": 0.01, "place": "loss", "estimator": "k2"}},
    ),
    "gspo": Algorithm(
        says="A as in grpo, times one ratio per response, exp(mean(log p - log p_old)), clipped to "
        "[1 - 3e-4, 1 + 4e-4]; with one optimizer step per rollout the ratio is 1 "
        "(arXiv:2507.18071)",
        objective="gspo",
        aggregation="sequence",
        options={"clip": {"low": 3e-4, "high": 4e-4}},
    ),
    "cispo": Algorithm(
        objective="cispo",
        says="A as in grpo; loss -min(r, 5) A log p with no gradient through the weight min(r, 5): "
        "a token beyond the bound weighs less and still has a gradient (arXiv:2506.13585, which "
        "does not give its bound)",
        options={"clip": {"low": 1.0, "high": 4.0}},
    ),
    "remax": Algorithm(
        "greedy",
        says="A = R - KL - R of the greedy response, which is one response more to each prompt; "
        "one that scores like the greedy one has advantage 0 but for its KL (arXiv:2310.10505)",
        needs_greedy=True,
        compares_group=False,
        scales=("none",),
        scale="none",
        aggregation="sequence_sum",
        options={
            "group_size": 1,
            "kl": {"coef": 0.05, "place": "reward", "estimator": "k1"},
        },
    ),
    # PPO has its own stage kind, because of the critic's options.
    "ppo": Algorithm(
        "gae",
        says="A_t = delta_t + gamma lam A_t+1 with delta_t = r_t + gamma V_t+1 - V_t, whitened "
        "over the batch; the value behind a response that was cut is 0 unless 'truncation' says "
        "otherwise (arXiv:1707.06347, arXiv:1506.02438, arXiv:1909.08593)",
        needs_critic=True,
        compares_group=False,
        scales=("none",),
        scale="none",
    ),
}
"""Every algorithm by its name in a recipe; a new one needs an entry here and an estimator."""


def of_estimator(name: str) -> Algorithm:
    """Return the first algorithm with this estimator; its ``needs_*`` flags are the estimator's.

    Those of a function that a recipe names follow from its parameters.
    """
    known = next((a for a in ALGORITHMS.values() if a.estimator == name), None)
    if known is not None:
        return known
    return of_parameters(name, parameters_of(name) or ("group_ids", "scale"))


def of_parameters(name: str, parameters: Collection[str]) -> Algorithm:
    """Return the algorithm of the user's estimator, whose parameters say what it needs."""
    return Algorithm(
        name,
        needs_greedy="greedy_scores" in parameters,
        compares_group="group_ids" in parameters,
        scales=("std", "batch", "none") if "scale" in parameters else ("batch", "none"),
    )


def known_algorithm(name: str) -> str:
    """Return the name of an algorithm without a critic; raise ValueError for any other."""
    return _one_of(name, [n for n, a in ALGORITHMS.items() if not a.needs_critic])


def known_estimator(name: str) -> str:
    """Return the name of an estimator without a critic, or a function; raise ValueError else."""
    return (
        name
        if is_function(name)
        else _one_of(name, [a.estimator for a in ALGORITHMS.values() if not a.needs_critic])
    )


def known_objective(name: str) -> str:
    """Return the name of an objective of some algorithm, or a function; raise ValueError else."""
    return name if is_function(name) else _one_of(name, [a.objective for a in ALGORITHMS.values()])


def known_loss(name: str) -> str:
    """Return the name of a loss on pairs, or a function; raise ValueError for any other."""
    return name if is_function(name) else _one_of(name, list(PAIR_LOSSES))


def known_own_loss(name: str | None) -> str | None:
    """Return the name of a function of the user, or None; raise ValueError for any other."""
    if name is not None and not is_function(name):
        raise ValueError(f"found '{name}'; expected FILE.py:NAME or MODULE:NAME of your function")
    return name


def is_function(name: str) -> bool:
    """Return whether a name has the form of a function of the user."""
    return re.fullmatch(FUNCTION, name) is not None


def _one_of(name: str, names: list[str]) -> str:
    if name not in names:
        known = ", ".join(f"'{n}'" for n in dict.fromkeys(names))
        raise ValueError(f"found '{name}'; expected one of {known}{suggest(name, names)}")
    return name


def defaults_of(name: object) -> dict[str, Any]:
    """Return the defaults of an algorithm; {} if the name is not an algorithm."""
    if isinstance(name, str) and name in ALGORITHMS:
        return ALGORITHMS[name].defaults
    return {}


def with_preset(given: object) -> Any:
    """Return a stage's options merged over the defaults of its algorithm.

    This is for specs that are built in Python: recipe files already contain the defaults, with
    their origin. A value that is not a mapping is returned unchanged.
    """
    if not isinstance(given, dict):
        return given
    return _over(defaults_of(given.get("algorithm")), given)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _over(old, value)
        else:
            merged[key] = value
    return merged
