"""Losses of scorers beyond plain pairs: ties, and answers or steps judged one by one."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are not forward references
import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from jaxtyping import Bool, Float
from torch import Tensor


def tie_loss(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    tie: Bool[Tensor, " B"],
    *,
    tie_margin: float,
    center_coef: float = 0.0,
) -> Float[Tensor, " B"]:
    """Return the Rao-Kupper loss of pairs that may be ties: -log P(observed judgment).

    With d = chosen - rejected and m = tie_margin:
    P(chosen wins) = sigmoid(d - m), P(rejected wins) = sigmoid(-d - m),
    P(tie) = (e^(2m) - 1) sigmoid(d - m) sigmoid(-d - m); they add up to 1.

    Args:
        chosen: score of the preferred response, or of either response of a tie.
        rejected: score of the other response.
        tie: True where the two responses were judged equally good.
        tie_margin: score difference above which a win is likelier than not; log theta of the
            model, > 0. Equal responses tie with probability tanh(m / 2).
        center_coef: as in `bradley_terry_loss`.

    Returns:
        One loss per pair, not reduced.

    Reference:
        Rao and Kupper 1967, "Ties in paired-comparison experiments"; for language models
        arXiv:2409.17431.
    """
    assert tie_margin > 0.0, f"tie_margin {tie_margin} must be positive"
    difference = chosen - rejected
    wins = F.logsigmoid(difference - tie_margin)
    loses = F.logsigmoid(-difference - tie_margin)
    # log P(tie) = log(e^(2m) - 1) + log sigmoid(d - m) + log sigmoid(-d - m).
    tied = math.log(math.expm1(2.0 * tie_margin)) + wins + loses
    return -torch.where(tie, tied, wins) + center_coef * (chosen + rejected).square()


def answer_loss(
    scores: Float[Tensor, " B"], good: Bool[Tensor, " B"], *, good_weight: float, bad_weight: float
) -> Float[Tensor, " B"]:
    """Return the class-weighted cross-entropy of single responses labeled good or bad.

    good: -good_weight * log sigmoid(score); bad: -bad_weight * log sigmoid(-score)

    Args:
        scores: log-odds that the response is good.
        good: the label.
        good_weight: n / (2 n_good) gives both classes the same total weight.
        bad_weight: n / (2 n_bad).

    Returns:
        One loss per response, not reduced.
    """
    weights = torch.where(good, good_weight, bad_weight)
    return weights * F.binary_cross_entropy_with_logits(scores, good.float(), reduction="none")


def step_loss(
    values: Float[Tensor, "B T"], labels: Float[Tensor, "B T"], ends: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Return the cross-entropy at the end of each solution step, 0 at all other tokens.

    Args:
        values: log-odds that the solution is correct so far.
        labels: 1 where the step is correct, else 0; read at the ends only.
        ends: True at the last token of each step.

    Reference:
        arXiv:2305.20050 section 2.4: a process reward model reads one prediction after each step.
    """
    # (B, T): computed everywhere, since shapes must not depend on the number of steps.
    loss = F.binary_cross_entropy_with_logits(values, labels, reduction="none")
    return torch.where(ends, loss, torch.zeros_like(loss))
