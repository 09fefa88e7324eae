"""Objectives of the policy and the critic in an online step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align.core.errors import TrainingError
from align.losses.kl import corrected_kl, kl_estimate
from align.losses.policy import (
    PerToken,
    cispo_policy_loss,
    clipped_policy_loss,
    gspo_policy_loss,
    importance_weights,
)
from align.losses.value import clipped_value_loss
from align.models.logprobs import TokenLogprobs
from align.training.batch import PackedBatch
from align.training.own_code import named_function


def policy_objective(
    model: nn.Module,
    batch: PackedBatch,
    *,
    kl_coef: float,
    temperature: float,
    objective: str,
    clip: Mapping[str, float],
    dual_clip: float | None,
    importance: Mapping[str, Any],
    kl_in_loss: str | None,
    aggregation: str,
    max_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this micro-batch's part of the clipped policy loss and of its statistics.

    Without ``old_logprobs`` the batch takes part in exactly one optimizer step per rollout, so the
    old policy is the current one and its log-probabilities are the detached current ones.

    Args:
        model: the policy. batch: packed responses with their advantages.
        kl_coef: weight of the KL in the loss. temperature: temperature of the samples.
        objective: see ``policy_loss``. clip: ``clip_low`` and ``clip_high``.
        dual_clip: bound of the loss where the advantage is negative; None sets none.
        importance: options of ``importance_weights``, sampler against trainer.
        kl_in_loss: an estimator of ``kl_estimate``, or corrected; None adds no KL.
        aggregation, max_tokens: see ``reduce_policy_loss``.
    """
    out = model(
        batch.input_ids, batch.position_ids, temperature=temperature, entropy=True, mask=batch.mask
    )
    # All packed, (1, N): log-probabilities, mask, and tensors per token of the experience.
    logprobs, mask, tokens = out.logprobs, batch.mask, batch.per_token
    # Without stored values the current policy is the old one: ratio 1 with the gradient of
    # REINFORCE.
    old = tokens.get("old_logprobs", logprobs.detach())
    weights = _sampler_weights(old, batch, importance)
    parts = policy_loss(logprobs, old, batch, objective=objective, clip=clip, dual_clip=dual_clip)
    loss = parts.loss * weights
    # The KL is not importance weighted: it regularizes the current policy.
    if kl_in_loss is not None and kl_coef > 0.0:
        kl = _kl(logprobs, old, tokens["ref_logprobs"], estimator=kl_in_loss)
        loss = loss + kl_coef * kl.masked_fill(~mask, 0.0)
    stats = _statistics(parts, out, batch, old=old, weights=weights, cap=importance["cap"])
    total = reduce_policy_loss(loss, batch, aggregation=aggregation, max_tokens=max_tokens)
    # Connects an empty micro-batch to the graph, so that every rank runs the same backward pass.
    return total + 0.0 * logprobs.sum(), stats


def _sampler_weights(old: Tensor, batch: PackedBatch, importance: Mapping[str, Any]) -> Tensor:
    """Return what corrects the sampler's distribution, slightly different from the trainer's."""
    return importance_weights(
        old,
        batch.per_token["rollout_logprobs"],
        batch.mask,
        segment_ids=batch.segment_ids,
        num_segments=max(batch.num, 1),
        **importance,
    )


def _kl(logprobs: Tensor, old: Tensor, ref: Tensor, *, estimator: str) -> Tensor:
    if estimator == "corrected":
        return corrected_kl(logprobs, old, ref)
    return kl_estimate(logprobs, ref, estimator)


def _statistics(
    parts: PerToken,
    out: TokenLogprobs,
    batch: PackedBatch,
    *,
    old: Tensor,
    weights: Tensor,
    cap: float,
) -> dict[str, Tensor]:
    """Return this micro-batch's part of each mean over the trained tokens of all ranks."""
    tokens, mask = batch.per_token, batch.mask
    assert out.entropy is not None
    share = 1.0 / max(batch.counts["tokens"], 1.0)

    def token_share(x: Tensor) -> Tensor:
        return x.detach().float().masked_fill(~mask, 0.0).sum() * share

    log_ratio = out.logprobs.detach() - old
    return {
        "ratio": token_share(parts.ratio),
        "clip_frac": token_share(parts.clipped),
        "entropy": token_share(out.entropy),
        # k3 of KL(old || new) at samples of the old policy: how far this update has moved.
        "approx_kl": token_share(torch.exp(log_ratio) - 1.0 - log_ratio),
        "sampler_kl": token_share(tokens["rollout_logprobs"] - old),
        "sampler_gap": token_share((tokens["rollout_logprobs"] - old).abs()),
        "importance_weight": token_share(weights),
        "importance_bounded": token_share((weights == 0.0) | (weights >= cap)),
    }


def _own_loss(
    logprobs: Tensor, old: Tensor, batch: PackedBatch, *, objective: str, clip: Mapping[str, float]
) -> PerToken:
    """Return what an objective of the user gives: PerToken, or the loss of each token alone."""
    found = named_function("objective", objective)(
        logprobs, old, batch.per_token["advantages"], batch.mask, **clip
    )
    loss = found.loss if isinstance(found, PerToken) else found
    if not isinstance(loss, Tensor) or loss.shape != logprobs.shape:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(found).__name__
        raise TrainingError(
            f"objective '{objective}' returned {shape}; expected the loss of each token, a tensor "
            f"of the shape of 'logprobs' {tuple(logprobs.shape)}, or PerToken"
        )
    if isinstance(found, PerToken):
        return found
    return PerToken(loss, (logprobs - old).exp().detach(), torch.zeros_like(batch.mask))


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    batch: PackedBatch,
    *,
    objective: str,
    clip: Mapping[str, float],
    dual_clip: float | None = None,
) -> PerToken:
    """Return the loss of each token, (1, N), by one of three objectives or one from elsewhere.

    clip: the probability ratio of each token is clipped. gspo: that of each response. cispo: the
    weight of each token is clipped, but not its gradient. ``module:function``: the function is
    called like ``cispo_policy_loss``.
    """
    advantages, mask = batch.per_token["advantages"], batch.mask  # (1, N)
    if objective == "clip":
        return clipped_policy_loss(logprobs, old, advantages, mask, **clip, dual_clip=dual_clip)
    if objective == "cispo":
        return cispo_policy_loss(logprobs, old, advantages, mask, **clip)
    if ":" in objective:
        return _own_loss(logprobs, old, batch, objective=objective, clip=clip)
    assert objective == "gspo", f"unknown objective {objective!r}"
    parts = gspo_policy_loss(
        logprobs[0],
        old[0],
        advantages[0],
        mask[0],
        segment_ids=batch.segment_ids,
        num_segments=max(batch.num, 1),
        **clip,
    )
    # Back from (N,) to the packed layout (1, N).
    rows = (x.unsqueeze(0) for x in (parts.loss, parts.ratio, parts.clipped))
    return PerToken(*rows)


def reduce_policy_loss(
    loss: Tensor, batch: PackedBatch, *, aggregation: str, max_tokens: int
) -> Tensor:
    """Return the mean of per-token losses (1, N) with global counts, by one of four rules.

    token: over all trained tokens. sequence: over tokens of each response, then over responses.
    sequence_sum: sum over tokens of each response, then mean over responses.
    constant: over responses times ``max_tokens`` (Dr. GRPO, arXiv:2503.20783).
    """
    loss = loss.masked_fill(~batch.mask, 0.0)
    if aggregation == "token":
        return loss.sum() / max(batch.counts["tokens"], 1.0)
    answers = max(batch.counts["answers"], 1.0)
    if aggregation == "sequence_sum":
        return loss.sum() / answers
    if aggregation == "constant":
        return loss.sum() / (answers * max_tokens)
    assert aggregation == "sequence", f"unknown aggregation {aggregation!r}"
    # Mean per response first, so that long responses do not dominate.
    lengths = batch.segment_sums(batch.mask.float()).clamp(min=1.0)  # (num,)
    return (batch.segment_sums(loss) / lengths).sum() / answers


def critic_objective(
    model: nn.Module, batch: PackedBatch, *, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this micro-batch's part of the clipped value loss."""
    # (1, N): the value of the state before each token.
    values = model(batch.input_ids, batch.position_ids)
    tokens, mask = batch.per_token, batch.mask
    loss = clipped_value_loss(values, tokens["values"], tokens["returns"], clip=clip)
    share = 1.0 / max(batch.counts["tokens"], 1.0)
    # Counts tokens outside the clip range, whether or not the clipped error is the larger one.
    clipped = (values.detach() - tokens["values"]).abs() > clip
    stats = {"clip_frac": (clipped & mask).sum() * share}
    return loss.masked_fill(~mask, 0.0).sum() * share + 0.0 * values.sum(), stats
