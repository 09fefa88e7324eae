"""Losses on pairs of a chosen and a rejected response, and on single judged responses.

Bradley-Terry for scorers; DPO, SimPO, ORPO and KTO for policies.
"""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are not forward references
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Bool, Float, Int
from torch import Tensor

from align.losses.reduce import segment_sum

DPO_KINDS = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust")


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """Loss of each pair, and the implicit rewards of its two responses.

    Attributes:
        loss: one value per pair, not reduced.
        chosen_rewards: beta * log(policy / reference) of the chosen response, detached; without a
            reference beta * mean log-probability.
        rejected_rewards: the same of the rejected response.
    """

    loss: Float[Tensor, " B"]
    chosen_rewards: Float[Tensor, " B"]
    rejected_rewards: Float[Tensor, " B"]


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross-entropy of "chosen wins" against the target 1 - label_smoothing."""
    # logsigmoid, not log(sigmoid): the latter is -inf for logits below about -100 in float32.
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def bradley_terry_loss(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    *,
    margin: Float[Tensor, " B"] | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """Return the Bradley-Terry loss of each pair of scores.

    -log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2

    Args:
        chosen: score of the preferred response.
        rejected: score of the other response.
        margin: minimum score difference of the pair; None means 0.
        center_coef: weight of the penalty that keeps scores near 0; 0.01 in the paper.
        label_smoothing: assumed fraction of swapped labels, in [0, 0.5): the target probability
            that chosen beats rejected by the margin is 1 minus it.

    Returns:
        One loss per pair, not reduced.

    Reference:
        arXiv:1706.03741 eq. 1; margin arXiv:2307.09288 eq. 2; centering arXiv:2312.09244.
    """
    assert 0.0 <= label_smoothing < 0.5, f"label_smoothing {label_smoothing} not in [0, 0.5)"
    logits = chosen - rejected if margin is None else chosen - rejected - margin
    return _smoothed(logits, label_smoothing) + center_coef * (chosen + rejected).square()


def _pair_loss(difference: Tensor, beta: float, label_smoothing: float, kind: str) -> Tensor:
    logits = beta * difference
    if kind in ("sigmoid", "sigmoid_norm"):
        return _smoothed(logits, label_smoothing)
    if kind == "robust":
        # Unbiased under label noise: the expected loss equals that of clean labels
        # (arXiv:2403.00409).
        agree = (1.0 - label_smoothing) * F.logsigmoid(logits)
        swapped = label_smoothing * F.logsigmoid(-logits)
        return (swapped - agree) / (1.0 - 2.0 * label_smoothing)
    if kind == "hinge":
        return torch.relu(1.0 - logits)
    # ipo regresses the difference to a fixed margin, so it cannot grow without bound.
    return (difference - 1.0 / (2.0 * beta)).square()


def _check_dpo(beta: float, label_smoothing: float, kind: str) -> None:
    assert kind in DPO_KINDS, f"unknown DPO kind {kind!r}"
    assert beta > 0.0, f"beta {beta} must be positive"
    assert 0.0 <= label_smoothing < 0.5, f"label_smoothing {label_smoothing} not in [0, 0.5)"
    assert label_smoothing == 0.0 or kind not in ("hinge", "ipo"), (
        f"label_smoothing {label_smoothing} has no effect on kind {kind!r}"
    )


def dpo_loss(
    policy_chosen: Float[Tensor, " B"],
    policy_rejected: Float[Tensor, " B"],
    ref_chosen: Float[Tensor, " B"],
    ref_rejected: Float[Tensor, " B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> PreferenceLoss:
    """Return the loss of direct preference optimization (DPO) for each pair.

    With d = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected), L+ = -log sigmoid(
    beta d), L- = -log sigmoid(-beta d) and e = label_smoothing:
    sigmoid (1 - e) L+ + e L- (e > 0 is cDPO); robust ((1 - e) L+ - e L-) / (1 - 2 e);
    sigmoid_norm the same on means; hinge max(0, 1 - beta d); ipo (d - 1 / (2 beta))^2.

    Args:
        policy_chosen: log-probability of the chosen response under the policy, in nats: the SUM
            over its tokens (stop token included) for sigmoid, robust and hinge, the MEAN per token
            for ipo and sigmoid_norm. The caller chooses; the four arguments must agree. A beta on
            means is not comparable with one on sums.
        policy_rejected: the same of the rejected response.
        ref_chosen: the same of the chosen response under the reference, without gradient.
        ref_rejected: the same of the rejected response.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: assumed fraction of swapped labels, in [0, 0.5); must be 0 for hinge and
            ipo, which have no such term.
        kind: sigmoid, sigmoid_norm, hinge, ipo or robust.

    Returns:
        Loss and implicit rewards, one value per pair.

    Reference:
        sigmoid arXiv:2305.18290 eq. 7; hinge arXiv:2309.06657; ipo arXiv:2310.12036 eq. 17, on
        means per token instead of the paper's sums; robust arXiv:2403.00409; sigmoid_norm
        arXiv:2411.15124 section 5.1.1.
    """
    _check_dpo(beta, label_smoothing, kind)
    # Log-ratios to the reference, (B,).
    chosen_ratio = policy_chosen - ref_chosen
    rejected_ratio = policy_rejected - ref_rejected
    loss = _pair_loss(chosen_ratio - rejected_ratio, beta, label_smoothing, kind)
    return PreferenceLoss(
        loss=loss,
        chosen_rewards=(beta * chosen_ratio).detach(),
        rejected_rewards=(beta * rejected_ratio).detach(),
    )


def simpo_loss(
    chosen_means: Float[Tensor, " B"],
    rejected_means: Float[Tensor, " B"],
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Return SimPO's loss of each pair: mean log-probabilities, without a reference.

    -log sigmoid(beta * (chosen - rejected) - gamma), smoothed as in ``dpo_loss``.

    Args:
        chosen_means: log-probability per token of the chosen response, in nats.
        rejected_means: the same of the rejected response.
        beta: scale of the difference, > 0; 2 to 10 in the paper.
        gamma: target margin of the chosen response, >= 0.
        label_smoothing: assumed fraction of swapped labels, in [0, 0.5).

    Reference:
        arXiv:2405.14734 eq. 6; smoothing is an addition.
    """
    assert beta > 0.0, f"beta {beta} must be positive"
    assert gamma >= 0.0, f"gamma {gamma} must not be negative"
    loss = _smoothed(beta * (chosen_means - rejected_means) - gamma, label_smoothing)
    return PreferenceLoss(loss, (beta * chosen_means).detach(), (beta * rejected_means).detach())


def orpo_loss(
    chosen_means: Float[Tensor, " B"], rejected_means: Float[Tensor, " B"], *, beta: float
) -> PreferenceLoss:
    """Return ORPO's loss of each pair: NLL of the chosen response plus a log odds ratio.

    -chosen - beta * log sigmoid(log odds(chosen) - log odds(rejected)), where the odds are
    p / (1 - p) with p = exp(mean log-probability).

    Args:
        chosen_means: log-probability per token of the chosen response, in nats, below 0.
        rejected_means: the same of the rejected response.
        beta: weight of the odds ratio (lambda in the paper), > 0.

    Reference:
        arXiv:2403.07691 eq. 6 and 7. Deviation: p is kept below 1 - 1e-6, because odds are infinite
        at 1.
    """
    assert beta > 0.0, f"beta {beta} must be positive"

    def log_odds(mean: Tensor) -> Tensor:
        # log(p / (1 - p)) with log p = mean; expm1 keeps 1 - p exact where p is near 1.
        mean = mean.clamp(max=-1e-6)
        return mean - torch.log(-torch.expm1(mean))

    ratio = F.logsigmoid(log_odds(chosen_means) - log_odds(rejected_means))
    rewards = ((beta * x).detach() for x in (chosen_means, rejected_means))
    return PreferenceLoss(-chosen_means - beta * ratio, *rewards)


def kto_loss(
    policy: Float[Tensor, " B"],
    ref: Float[Tensor, " B"],
    desirable: Bool[Tensor, " B"],
    *,
    kl: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """Return KTO's loss of single responses that were labeled good or bad.

    weight * (1 - sigmoid(beta * (policy - ref - kl))) for a good response; for a bad one the sign
    inside the sigmoid is flipped.

    Args:
        policy: log-probability of each response under the policy, sums over tokens, in nats.
        ref: the same under the reference, without gradient.
        desirable: True where the response was judged good.
        kl: reference point: estimated KL of the policy to the reference on mismatched responses, in
            nats, >= 0 and without gradient.
        beta: strength of the pull to the reference, > 0.
        desirable_weight: weight of a good response.
        undesirable_weight: weight of a bad one.

    Reference:
        arXiv:2402.01306 eq. 8, including its constant (the weight), which keeps the loss positive.
    """
    assert beta > 0.0, f"beta {beta} must be positive"
    assert kl >= 0.0, f"kl {kl} must not be negative"
    # eq. 8: gains and losses are measured from the reference point kl, not from 0.
    distance = beta * (policy - ref - kl)
    signed = torch.where(desirable, distance, -distance)
    shortfall = 1.0 - torch.sigmoid(signed)
    return torch.where(desirable, desirable_weight * shortfall, undesirable_weight * shortfall)


def tail_weights(
    mask: Bool[Tensor, " N"], segment_ids: Int[Tensor, " N"], num_segments: int, *, alpha: float
) -> Float[Tensor, " N"]:
    """Return token weights that damp what exceeds the length of the pair's shorter response.

    Args:
        mask: True on the tokens of responses in a packed row; responses 2k and 2k + 1 are a pair.
        segment_ids: which response a token belongs to, in order.
        num_segments: responses in the row, an even number.
        alpha: weight of a token beyond the length of the pair's shorter response, in [0, 1].

    Returns:
        1, alpha or (where the mask is False) 0.

    Reference:
        arXiv:2409.06411 (LD-DPO) eq. 9.
    """
    assert 0.0 <= alpha <= 1.0, f"alpha {alpha} not in [0, 1]"
    # Counts in float64: float32 cannot count beyond 2^24 tokens in a row.
    lengths = segment_sum(mask.double(), segment_ids, num_segments)
    # Position of each token within its response, counting trained tokens.
    before = lengths.cumsum(0) - lengths
    rank = mask.double().cumsum(0) - before[segment_ids]  # 1 at the first token of a response
    # Responses 2k and 2k + 1 are a pair: (S,) -> (S/2, 2) -> (S/2,) -> (S,).
    shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)
    weights = torch.where(rank > shorter[segment_ids], alpha, 1.0)
    return weights.masked_fill(~mask, 0.0).float()


def soft_labels(
    loss: Float[Tensor, " B"], turned: Float[Tensor, " B"], label_prob: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Return the expected loss of pairs whose labels are only probably correct.

    label_prob * loss + (1 - label_prob) * turned

    Args:
        loss: of the pairs as given. turned: of the same pairs with their responses exchanged.
        label_prob: probability that the chosen response is the better one, in [0, 1].

    Reference:
        Cross-entropy against a soft label. cDPO uses one probability for all pairs
        (arXiv:2305.18290, appendix); here each pair has its own (stage weak_label).
    """
    return label_prob * loss + (1.0 - label_prob) * turned
