"""Losses on pairs of a chosen and a rejected answer: Bradley-Terry and the DPO family."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are no forward references
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """Hold the loss of each pair and the implicit rewards behind it.

    Attributes:
        loss: one value per pair, not reduced.
        chosen_rewards: beta * log(policy / reference) of the chosen answer, detached.
        rejected_rewards: the same of the rejected answer.
    """

    loss: Float[Tensor, " B"]
    chosen_rewards: Float[Tensor, " B"]
    rejected_rewards: Float[Tensor, " B"]


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Give the cross-entropy of "chosen wins" against the target 1 - label_smoothing."""
    return -(1.0 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def bradley_terry_loss(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    *,
    margin: Float[Tensor, " B"] | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " B"]:
    """Give the Bradley-Terry loss of each pair of scores.

    -log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2

    Args:
        chosen: score of the preferred answer.
        rejected: score of the other answer.
        margin: score difference that the pair should at least show; None is 0.
        center_coef: weight of the penalty that holds scores near 0; 0.01 in the paper.
        label_smoothing: assumed share of swapped labels, in [0, 0.5): the target probability that
            chosen beats rejected by the margin is 1 minus it.

    Returns:
        One loss per pair, not reduced.

    Reference:
        arXiv:1706.03741 eq. 1; margin arXiv:2307.09288 eq. 2; centring arXiv:2312.09244.
    """
    assert 0.0 <= label_smoothing < 0.5, f"label_smoothing {label_smoothing} not in [0, 0.5)"
    logits = chosen - rejected if margin is None else chosen - rejected - margin
    return _smoothed(logits, label_smoothing) + center_coef * (chosen + rejected).square()


def _pair_loss(difference: Tensor, beta: float, label_smoothing: float, kind: str) -> Tensor:
    logits = beta * difference
    if kind == "sigmoid":
        return _smoothed(logits, label_smoothing)
    if kind == "robust":
        agree = (1.0 - label_smoothing) * F.logsigmoid(logits)
        swapped = label_smoothing * F.logsigmoid(-logits)
        return (swapped - agree) / (1.0 - 2.0 * label_smoothing)
    if kind == "hinge":
        return torch.relu(1.0 - logits)
    return (difference - 1.0 / (2.0 * beta)).square()


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
    """Give the loss of direct preference optimisation for each pair.

    With d = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected), L+ = -log sigmoid(
    beta d), L- = -log sigmoid(-beta d) and e = label_smoothing:
    sigmoid (1 - e) L+ + e L- (e > 0 is cDPO); robust ((1 - e) L+ - e L-) / (1 - 2 e);
    hinge max(0, 1 - beta d); ipo (d - 1 / (2 beta))^2.

    Args:
        policy_chosen: log-probability of the chosen answer under the policy, in nats: the SUM over
            its tokens (stop token included) for sigmoid, robust and hinge, the MEAN per token for
            ipo. The caller chooses; the four arguments must agree. A beta of ipo on means is not
            comparable with one on sums.
        policy_rejected: the same of the rejected answer.
        ref_chosen: the same of the chosen answer under the reference, without gradient.
        ref_rejected: the same of the rejected answer.
        beta: strength of the pull to the reference, > 0.
        label_smoothing: assumed share of swapped labels, in [0, 0.5); must be 0 for hinge and ipo,
            which have no such term.
        kind: sigmoid, hinge, ipo or robust.

    Returns:
        Loss and implicit rewards, one value per pair.

    Reference:
        sigmoid arXiv:2305.18290 eq. 7; hinge arXiv:2309.06657; ipo arXiv:2310.12036 eq. 17, on
        means per token instead of the paper's sums; robust arXiv:2403.00409.
    """
    assert kind in ("sigmoid", "hinge", "ipo", "robust"), f"unknown DPO kind {kind!r}"
    assert beta > 0.0, f"beta {beta} must be positive"
    assert 0.0 <= label_smoothing < 0.5, f"label_smoothing {label_smoothing} not in [0, 0.5)"
    assert label_smoothing == 0.0 or kind in ("sigmoid", "robust"), (
        f"label_smoothing {label_smoothing} has no effect on kind {kind!r}"
    )
    chosen_ratio = policy_chosen - ref_chosen
    rejected_ratio = policy_rejected - ref_rejected
    loss = _pair_loss(chosen_ratio - rejected_ratio, beta, label_smoothing, kind)
    return PreferenceLoss(
        loss=loss,
        chosen_rewards=(beta * chosen_ratio).detach(),
        rejected_rewards=(beta * rejected_ratio).detach(),
    )
