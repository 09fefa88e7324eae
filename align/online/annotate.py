"""Annotate sampled responses with old and reference log-probabilities and values."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from align.core import distributed
from align.data.batching import plan_micro_batches
from align.models.idle import in_use
from align.recipe.schema import OnlineStage
from align.sampling.rollout import Experience
from align.training.batch import PackedBatch
from align.training.learner import Learner


def plan_by_prompt(
    experience: Experience, rows: Sequence[int], micro_tokens: int
) -> list[list[int]]:
    """Split this rank's rows into micro-batches; every rank gets the same number of them.

    Responses to one prompt stay together as far as the token budget allows, because their prompt
    is computed once. Ranks have different responses, but ZeRO-3 needs the same number of forward
    passes on each.
    """
    units = _units(experience, rows, micro_tokens)
    # ranks=1: the rows are already divided among the ranks, only micro-batches are planned here.
    costs = [_cost(experience, unit) for unit in units]
    plan = plan_micro_batches(costs, micro_tokens=micro_tokens, ranks=1)[0] if units else []
    # Pad with empty micro-batches, whose forward pass joins ZeRO-3's gathers.
    wanted = int(distributed.global_max(len(plan)))
    plan = plan + [[]] * (wanted - len(plan))
    return [[row for unit in micro for row in units[unit]] for micro in plan]


def _cost(experience: Experience, rows: Sequence[int]) -> int:
    """Return the number of tokens of rows packed in this order."""
    return int(experience.lengths[list(rows)].sum()) - sum(experience.shared(rows))


def _units(experience: Experience, rows: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Return runs of consecutive responses to one prompt that fit the token budget."""
    groups = experience.group_ids.tolist()
    units: list[list[int]] = []
    for row in rows:
        # Consecutive responses to one prompt form a unit as long as they fit together.
        same = bool(units) and groups[units[-1][0]] == groups[row]
        if same and _cost(experience, [*units[-1], row]) <= micro_tokens:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def annotate(
    experience: Experience,
    policy: Learner,
    spec: OnlineStage,
    *,
    old: bool,
    reference: nn.Module | None,
    critic: Learner | None,
) -> Experience:
    """Return the experience with old_logprobs, ref_logprobs and values as requested.

    Args:
        experience: responses of this step. policy: the learner, before its update.
        spec: the stage. old: whether the policy's own log-probabilities are needed.
        reference: the frozen reference policy, or the policy's own module, which runs with its
            adapter off; None for no reference.
        critic: the value learner; None for no values.
    """
    plan = plan_by_prompt(experience, range(len(experience.lengths)), spec.micro_tokens)
    temperature = spec.sampling.temperature

    def logprobs(model: nn.Module, batch: PackedBatch) -> Tensor:
        # Needed on every completion token, including responses that are not trained.
        return model(
            batch.input_ids, batch.position_ids, temperature=temperature, mask=batch.mask
        ).logprobs

    def values(model: nn.Module, batch: PackedBatch) -> Tensor:
        return model(batch.input_ids, batch.position_ids)

    # The mask selects whose log-probabilities are computed: every completion token.
    whole = replace(experience, mask=experience.completion)
    found = {}
    if old:
        found["old_logprobs"] = infer_tokens(whole, policy, plan=plan, fn=logprobs)
    if reference is not None:
        # A LoRA policy is its own reference with the adapter off, which saves a copy of the model.
        own = reference is policy.module
        with policy.module.model.disable_adapter() if own else in_use(reference):
            # The learner runs its engine; a separate reference runs as a plain module.
            run: Any = policy if own else reference.eval()
            found["ref_logprobs"] = infer_tokens(whole, run, plan=plan, fn=logprobs)
    if critic is not None:
        found["values"] = infer_tokens(whole, critic, plan=plan, fn=values)
        if spec.truncation == "bootstrap":
            experience = replace(experience, bootstrap=_values_behind(experience, critic, spec))
    return experience.with_tokens(**found)


def _values_behind(experience: Experience, critic: Learner, spec: OnlineStage) -> Tensor:
    """Return the critic's value after each truncated response, (B,); 0 after a finished one."""
    rows = experience.truncated.nonzero().flatten().tolist()
    plan = plan_by_prompt(experience, rows, spec.micro_tokens)
    batches = [experience.micro(micro, {}) for micro in plan]
    found = critic.infer(batches, lambda model, b: model(b.input_ids, b.position_ids, behind=True))
    out = torch.zeros(len(experience.lengths))
    for micro, batch, values in zip(plan, batches, found, strict=True):
        # Index of the last token of each response in the packed row (1, N).
        ends = torch.bincount(batch.segment_ids).cumsum(0) - 1
        # Empty micro-batches contain one placeholder segment, which [: num] cuts off.
        out[micro] = values[0, ends].float().cpu()[: batch.num]
    return out


@torch.no_grad()
def infer_tokens(
    experience: Experience,
    model: Learner | nn.Module,
    *,
    plan: Sequence[Sequence[int]],
    fn: Callable[[nn.Module, PackedBatch], Tensor],
) -> Tensor:
    """Return the result of ``fn`` for every token, (B, T), run in the micro-batches of ``plan``."""
    # (B, T); what is computed elsewhere, such as a shared prompt, stays 0.
    out = torch.zeros(experience.input_ids.shape)
    batches = [experience.micro(rows, {}) for rows in plan]
    if isinstance(model, Learner):
        results = model.infer(batches, fn)
    else:
        results = [fn(model, batch) for batch in batches]
    for rows, packed in zip(plan, results, strict=True):
        experience.spread(rows, packed, out)
    return out
