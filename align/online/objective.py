"""What the policy and the critic are differentiated through in an online step."""

import torch
from torch import Tensor, nn

from align.losses.kl import corrected_kl, kl_estimate
from align.losses.policy import (
    PerToken,
    cispo_policy_loss,
    clipped_policy_loss,
    gspo_policy_loss,
    importance_weights,
)
from align.losses.value import clipped_value_loss
from align.recipe.schema import GrpoStage, OnlineStage, PpoStage
from align.training.batch import PackedBatch


def policy_objective(
    spec: OnlineStage, kl_coef: float, model: nn.Module, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give this micro-batch's share of the clipped policy loss and of its statistics.

    Without ``old_logprobs`` the batch takes part in exactly one optimiser step per rollout, so the
    old policy is the current one and its log-probabilities are the detached current ones.
    """
    out = model(
        batch.input_ids,
        batch.position_ids,
        temperature=spec.sampling.temperature,
        entropy=True,
        mask=batch.mask,
    )
    logprobs, mask, tokens = out.logprobs, batch.mask, batch.per_token
    old = tokens.get("old_logprobs", logprobs.detach())
    weights = importance_weights(
        old,
        tokens["rollout_logprobs"],
        mask,
        segment_ids=batch.segment_ids,
        num_segments=max(batch.num, 1),
        **spec.importance.model_dump(),
    )
    parts = policy_loss(spec, logprobs, old, batch)
    loss = parts.loss * weights
    if spec.kl.place == "loss" and kl_coef > 0.0:
        ref = tokens["ref_logprobs"]
        kl = (
            corrected_kl(logprobs, old, ref)
            if spec.kl.corrected
            else kl_estimate(logprobs, ref, spec.kl.estimator)
        )
        loss = loss + kl_coef * kl.masked_fill(~mask, 0.0)
    share = 1.0 / max(batch.counts["tokens"], 1.0)

    def token_share(x: Tensor) -> Tensor:
        return x.detach().float().masked_fill(~mask, 0.0).sum() * share

    log_ratio = logprobs.detach() - old
    stats = {
        "ratio": token_share(parts.ratio),
        "clip_frac": token_share(parts.clipped),
        "entropy": token_share(out.entropy),
        "approx_kl": token_share(torch.exp(log_ratio) - 1.0 - log_ratio),
        "sampler_kl": token_share(tokens["rollout_logprobs"] - old),
        "sampler_gap": token_share((tokens["rollout_logprobs"] - old).abs()),
        "importance_weight": token_share(weights),
        "importance_bounded": token_share((weights == 0.0) | (weights >= spec.importance.cap)),
    }
    return reduce_policy_loss(spec, loss, batch) + 0.0 * logprobs.sum(), stats


def policy_loss(spec: OnlineStage, logprobs: Tensor, old: Tensor, batch: PackedBatch) -> PerToken:
    """Give the loss of each token, (1, N), by the recipe's objective."""
    advantages, mask = batch.per_token["advantages"], batch.mask
    clip = {"clip_low": spec.clip.low, "clip_high": spec.clip.high}
    objective = spec.objective if isinstance(spec, GrpoStage) else "clip"
    if objective == "clip":
        return clipped_policy_loss(
            logprobs, old, advantages, mask, **clip, dual_clip=spec.clip.dual
        )
    if objective == "cispo":
        return cispo_policy_loss(logprobs, old, advantages, mask, **clip)
    parts = gspo_policy_loss(
        logprobs[0],
        old[0],
        advantages[0],
        mask[0],
        segment_ids=batch.segment_ids,
        num_segments=max(batch.num, 1),
        **clip,
    )
    rows = (x.unsqueeze(0) for x in (parts.loss, parts.ratio, parts.clipped))
    return PerToken(*rows)


def reduce_policy_loss(spec: OnlineStage, loss: Tensor, batch: PackedBatch) -> Tensor:
    """Average per-token losses (1, N) by the recipe's rule, with global counts.

    token: over all trained tokens. sequence: over tokens of each answer, then over answers.
    sequence_sum: sum over tokens of each answer, then mean over answers.
    constant: over answers times max_new_tokens (Dr. GRPO, arXiv:2503.20783).
    """
    kind = spec.aggregation if isinstance(spec, GrpoStage) else "token"
    loss = loss.masked_fill(~batch.mask, 0.0)
    if kind == "token":
        return loss.sum() / max(batch.counts["tokens"], 1.0)
    answers = max(batch.counts["answers"], 1.0)
    if kind == "sequence_sum":
        return loss.sum() / answers
    if kind == "constant":
        return loss.sum() / (answers * spec.sampling.max_new_tokens)
    lengths = batch.segment_sums(batch.mask.float()).clamp(min=1.0)
    return (batch.segment_sums(loss) / lengths).sum() / answers


def critic_objective(
    spec: PpoStage, model: nn.Module, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give this micro-batch's share of the clipped value loss."""
    values = model(batch.input_ids, batch.position_ids)
    tokens, mask = batch.per_token, batch.mask
    loss = clipped_value_loss(values, tokens["values"], tokens["returns"], clip=spec.critic.clip)
    share = 1.0 / max(batch.counts["tokens"], 1.0)
    clipped = (values.detach() - tokens["values"]).abs() > spec.critic.clip
    stats = {"clip_frac": (clipped & mask).sum() * share}
    return loss.masked_fill(~mask, 0.0).sum() * share + 0.0 * values.sum(), stats
