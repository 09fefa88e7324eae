"""What distinguishes one online algorithm from another, built from a stage's recipe.

An algorithm is an entry of ``align.recipe.algorithms.ALGORITHMS`` and a function that computes its
advantages. The parameter names of the function select its inputs. For one advantage per response:
``scores``, ``group_ids`` and ``greedy_scores`` of the trained responses, (B,). For one advantage
per token: ``rewards``, ``values``, ``mask``, (B, T), and ``bootstrap``, (B,). Any other parameter
is an option of the stage, such as ``scale`` or ``gamma``.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from align.core import distributed
from align.core.errors import RecipeError, TrainingError
from align.losses.kl import kl_estimate
from align.losses.reduce import masked_moments, masked_whiten
from align.online.advantages import ESTIMATORS, batch_scaled, shaped_rewards
from align.online.objective import critic_objective, policy_objective
from align.recipe.algorithms import of_parameters
from align.recipe.schema import OnlineStage
from align.sampling.rollout import Experience
from align.training.learner import LossFunction
from align.training.own_code import named_function

Estimator = Callable[..., Tensor | tuple[Tensor, Tensor]]
PER_RESPONSE = ("scores", "group_ids", "greedy_scores")
PER_TOKEN = ("rewards", "values", "mask", "bootstrap")


@dataclass(frozen=True, slots=True)
class OnlineAlgorithm:
    """What distinguishes one online algorithm from another.

    Attributes:
        estimate: (experience, KL coefficient) -> experience with ``advantages`` (and ``returns``).
        policy_objective: (model, micro-batch, ``kl_coef``) -> loss and statistics of the policy.
        critic_objective: loss and statistics of the critic; None without one.
        critic_warmup_steps: number of first steps that train only the critic.
        needs_old_logprobs: whether the log-probabilities of the policy before the update are
            needed. With one optimizer step per rollout the old policy is the current one.
        needs_greedy: whether the greedy response to each prompt is sampled and scored too.
    """

    estimate: Callable[[Experience, float], Experience]
    policy_objective: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    critic_objective: LossFunction | None
    critic_warmup_steps: int
    needs_old_logprobs: bool
    needs_greedy: bool


def build_algorithm(spec: OnlineStage) -> OnlineAlgorithm:
    """Return the algorithm of a stage's recipe.

    Raises:
        TrainingError: its estimator is unknown, or has a parameter that no step provides, or its
            objective cannot be imported.
        RecipeError: the estimator needs what its parameters, read from the file, did not say.
    """
    facts = spec.algorithm_facts
    if ":" in spec.objective:
        named_function("objective", spec.objective)  # an error before the first step
    # Only the first of several steps is taken by the policy that sampled.
    several = spec.minibatches * spec.update_epochs > 1
    kl_in_loss = "corrected" if spec.kl.corrected else spec.kl.estimator
    objective = partial(
        policy_objective,
        temperature=spec.sampling.temperature,
        objective=spec.objective,
        clip={"clip_low": spec.clip.low, "clip_high": spec.clip.high},
        dual_clip=spec.clip.dual,
        importance=spec.importance.model_dump(),
        kl_in_loss=kl_in_loss if spec.kl.place == "loss" else None,
        aggregation=spec.aggregation,
        max_tokens=spec.sampling.max_new_tokens,
    )
    return OnlineAlgorithm(
        estimate=_build_estimate(spec),
        policy_objective=objective,
        critic_objective=spec.critic and partial(critic_objective, clip=spec.critic.clip),
        critic_warmup_steps=spec.critic.warmup_steps if spec.critic else 0,
        needs_old_logprobs=several or spec.kl.coef > 0.0 or facts.needs_critic,
        needs_greedy=facts.needs_greedy,
    )


def find_estimator(name: str) -> Estimator:
    """Return an estimator by its name or as ``FILE.py:NAME`` or ``MODULE:NAME``.

    Raises:
        TrainingError: there is none of that name.
    """
    if ":" in name:
        return named_function("estimator", name)
    if name not in ESTIMATORS:
        raise TrainingError(
            f"unknown estimator '{name}'; expected one of {', '.join(ESTIMATORS)}, or "
            "FILE.py:NAME or MODULE:NAME"
        )
    return ESTIMATORS[name]


def _build_estimate(spec: OnlineStage) -> Callable[[Experience, float], Experience]:
    estimator = find_estimator(spec.estimator)
    try:
        parameters = inspect.signature(estimator).parameters
    except ValueError as error:  # compiled
        raise TrainingError(
            f"estimator '{spec.estimator}': {error}; write it as a 'def'"
        ) from error
    # The signature is the interface: its parameters are inputs of a step or options of the stage.
    inputs = tuple(name for name in parameters if name in (*PER_RESPONSE, *PER_TOKEN))
    fields = type(spec).model_fields
    options = {n: getattr(spec, n) for n in parameters if n in fields and n not in inputs}
    per_response = bool(set(inputs) & set(PER_RESPONSE))
    unknown = [
        name
        for name, parameter in parameters.items()
        if name not in (*inputs, *options) and parameter.default is parameter.empty
    ]
    if unknown or not inputs or (per_response and set(inputs) & set(PER_TOKEN)):
        raise TrainingError(
            f"estimator '{spec.estimator}' takes {', '.join(parameters)}; expected some of "
            f"{', '.join(PER_RESPONSE)}, or some of {', '.join(PER_TOKEN)}, and options of a "
            f"{spec.kind} stage"
        )
    if ":" in spec.estimator:
        _check_facts(spec, list(parameters))
    kl_in_reward = spec.kl.estimator if spec.kl.place == "reward" else None
    if not per_response:
        return partial(
            estimate_per_token,
            estimator=partial(estimator, **options),
            inputs=inputs,
            kl_in_reward=kl_in_reward,
            whiten_rewards=spec.whiten_rewards,
        )
    # scale: batch divides once by the deviation over all groups, not also by that of each group.
    batch_scale = spec.scale == "batch"
    if batch_scale and "scale" in options:
        options["scale"] = "none"
    return partial(
        estimate_per_response,
        estimator=partial(estimator, **options),
        inputs=inputs,
        kl_in_reward=kl_in_reward,
        batch_scale=batch_scale,
    )


def _check_facts(spec: OnlineStage, parameters: Sequence[str]) -> None:
    """Check that an imported estimator needs what the recipe was checked with.

    A recipe is checked without importing the function; the parameters of an object or of an
    imported function are known only here.
    """
    checked, facts = spec.algorithm_facts, of_parameters(spec.estimator, parameters)
    same_groups = facts.compares_group == checked.compares_group
    if same_groups and facts.needs_greedy == checked.needs_greedy:
        if spec.scale in facts.scales:
            return
        what = f"scale {spec.scale!r} has no effect with it; write {' or '.join(facts.scales)}"
    else:
        what = (
            "these parameters decide how a group is sampled, and cannot be read without running "
            "the file; write the estimator as a 'def' at the top level of its file"
        )
    raise RecipeError(f"estimator {spec.estimator}: takes {', '.join(parameters)}: {what}")


def estimate_per_response(
    experience: Experience,
    kl_coef: float,
    *,
    estimator: Estimator,
    inputs: tuple[str, ...],
    kl_in_reward: str | None,
    batch_scale: bool,
) -> Experience:
    """Return the experience with one advantage for all tokens of a response.

    Responses without a valid score are excluded from their group and from the loss.

    Args:
        experience: scored responses. kl_coef: penalty per nat, in units of the score.
        estimator: maps ``inputs`` of the trained responses to their advantages.
        kl_in_reward: estimator of the KL that is subtracted from the score; None subtracts nothing.
        batch_scale: divide by the standard deviation over the batch of all ranks.

    Reference: arXiv:2402.03300 eq. 3; scale none arXiv:2503.20783; scale batch arXiv:2501.03262;
    leave_one_out arXiv:2402.14740; greedy arXiv:2310.10505.
    """
    scores = experience.scores  # (B,)
    kl = _kl(experience, kl_in_reward, kl_coef)  # (B, T)
    if kl is not None:
        # One advantage per response: the KL of its tokens is charged to the response as a whole,
        # (B,).
        scores = scores - kl_coef * (kl * experience.completion).sum(1)
    found = {"scores": scores, "group_ids": experience.group_ids}
    if experience.greedy_scores is not None:
        found["greedy_scores"] = experience.greedy_scores
    # The estimator sees only valid responses, so an invalid one shifts no group mean.
    trained = experience.mask.any(1)
    advantages = torch.zeros_like(scores)
    if bool(trained.any()):
        result = estimator(**{name: found[name][trained] for name in inputs})
        assert isinstance(result, Tensor), "one advantage per response expected"
        advantages[trained] = result
    # Sums over all ranks: every rank must divide by the same number, also one without responses.
    if batch_scale:
        squares = float(advantages.double().square().sum())
        moments = {"count": float(trained.sum()), "total_sq": squares}
        advantages = batch_scaled(advantages, **distributed.global_sums(moments))
    return experience.with_tokens(advantages=advantages.unsqueeze(1) * experience.mask)


def estimate_per_token(
    experience: Experience,
    kl_coef: float,
    *,
    estimator: Estimator,
    inputs: tuple[str, ...],
    kl_in_reward: str | None,
    whiten_rewards: bool,
) -> Experience:
    """Return the experience with advantages of tokens, whitened over the batch of all ranks.

    The value after the last token is 0. With ``truncation: bootstrap``, a response truncated at the
    length limit has not ended: it gets no score at its last token, and the value after it is the
    critic's. Both together would count the future twice.

    Args:
        experience: scored responses. kl_coef: penalty per nat, in units of the score.
        estimator: maps ``inputs`` to advantages, or to advantages and returns.
        kl_in_reward: estimator of the KL that is subtracted from the rewards; None subtracts
            nothing.
        whiten_rewards: divide the rewards by their standard deviation first.

    Reference: gae arXiv:1707.06347 eq. 11, arXiv:1909.08593 section 2; bootstrap arXiv:1712.00378;
    reward_to_go arXiv:2501.03262 (REINFORCE++).
    """
    mask = experience.mask
    rewards = _token_rewards(experience, _kl(experience, kl_in_reward, kl_coef), kl_coef)  # (B, T)
    # The mean is kept: centering would add a constant per token, which depends on the length.
    if whiten_rewards:
        rewards = _whiten(rewards, mask, center=False)
    found: Mapping[str, Tensor | None] = {
        "rewards": rewards,
        "values": experience.per_token.get("values"),
        "mask": mask,
        "bootstrap": experience.bootstrap,
    }
    result = estimator(**{name: found[name] for name in inputs})
    advantages, *returns = result if isinstance(result, tuple) else (result,)
    experience = experience.with_tokens(advantages=_whiten(advantages, mask, center=True))
    return experience.with_tokens(returns=returns[0]) if returns else experience


def _kl(experience: Experience, kl_in_reward: str | None, kl_coef: float) -> Tensor | None:
    """Return the KL estimate of each token, (B, T), or None if the reward has no KL penalty."""
    if kl_in_reward is None or kl_coef == 0.0:
        return None
    tokens = experience.per_token
    return kl_estimate(tokens["old_logprobs"], tokens["ref_logprobs"], kl_in_reward)


def _token_rewards(experience: Experience, kl: Tensor | None, kl_coef: float) -> Tensor:
    kl = torch.zeros_like(experience.per_token["rollout_logprobs"]) if kl is None else kl
    scores = experience.scores.nan_to_num(0.0)
    # A truncated response gets the critic's value after its end instead of its score.
    is_open = experience.truncated & (experience.bootstrap is not None)  # (B,)
    scores = scores.masked_fill(is_open, 0.0)
    # Process rewards place parts of the score at the tokens that end the steps, (B, T).
    steps = experience.per_token.get("step_rewards")
    if steps is None:
        return shaped_rewards(scores, kl, experience.mask, kl_coef=kl_coef)
    # The rest of the score goes to the last token, so that the rewards sum to the score.
    steps = steps.masked_fill(~experience.mask, 0.0)
    rest = (scores - steps.sum(1)).masked_fill(is_open, 0.0)
    return shaped_rewards(rest, kl, experience.mask, kl_coef=kl_coef) + steps


def _whiten(x: Tensor, mask: Tensor, *, center: bool) -> Tensor:
    # Moments over all ranks, so that advantages do not depend on how many ranks share the batch.
    count, total, total_sq = masked_moments(x, mask).tolist()
    sums = distributed.global_sums({"count": count, "total": total, "total_sq": total_sq})
    return masked_whiten(
        x,
        mask,
        center=center,
        count=sums["count"],
        total=sums["total"],
        total_sq=sums["total_sq"],
    )
