"""Preference losses against float64 definitions, limit cases and TRL's own code."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.preference import bradley_terry_loss, dpo_loss

KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0)]
numbers = st.floats(-30, 30)


def softplus(x):
    """Give log(1 + e^x) = -log sigmoid(-x) in float64 without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def dpo_by_definition(pw, pl, rw, rl, *, beta, eps, kind):
    """Give the DPO-family loss of one pair from the formulas of the papers."""
    d = (pw - rw) - (pl - rl)
    plus, minus = softplus(-beta * d), softplus(beta * d)
    if kind == "sigmoid":
        return (1 - eps) * plus + eps * minus
    if kind == "robust":
        return ((1 - eps) * plus - eps * minus) / (1 - 2 * eps)
    if kind == "hinge":
        return max(0.0, 1 - beta * d)
    return (d - 1 / (2 * beta)) ** 2


def column(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize(("kind", "eps"), KINDS)
@given(st.tuples(numbers, numbers, numbers, numbers), st.floats(0.01, 2.0))
def test_dpo_loss_equals_the_definition(kind, eps, logps, beta):
    out = dpo_loss(*map(column, logps), beta=beta, label_smoothing=eps, kind=kind)
    expected = dpo_by_definition(*logps, beta=beta, eps=eps, kind=kind)
    assert out.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert out.chosen_rewards.item() == pytest.approx(beta * (logps[0] - logps[2]), abs=1e-9)
    assert out.rejected_rewards.item() == pytest.approx(beta * (logps[1] - logps[3]), abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "at_start"), [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0)]
)
def test_dpo_loss_of_the_reference_itself(kind, at_start):
    chosen, rejected = column(-3.0, -40.0), column(-9.0, -0.5)
    out = dpo_loss(chosen, rejected, chosen, rejected, beta=0.3, kind=kind)
    assert out.loss.tolist() == pytest.approx([at_start, at_start])
    assert out.chosen_rewards.tolist() == out.rejected_rewards.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("kind", "eps"), KINDS)
def test_dpo_gradient_raises_chosen_and_lowers_rejected(kind, eps):
    chosen, rejected = column(-3.0, grad=True), column(-3.0, grad=True)
    ref = column(-3.0)
    dpo_loss(chosen, rejected, ref, ref, beta=0.5, label_smoothing=eps, kind=kind).loss.backward()
    assert chosen.grad.item() < 0 < rejected.grad.item()
    assert chosen.grad.item() == pytest.approx(-rejected.grad.item())


def test_dpo_label_smoothing_puts_the_minimum_where_the_labels_are_right_that_often():
    # cDPO is a cross-entropy: at sigmoid(beta d) = 1 - eps = 0.8, beta d = log 4, no gradient.
    d = column(math.log(4.0) / 0.5, grad=True)
    zero = column(0.0)
    dpo_loss(d, zero, zero, zero, beta=0.5, label_smoothing=0.2).loss.backward()
    assert d.grad.item() == pytest.approx(0.0, abs=1e-12)


@given(numbers, st.floats(0.01, 0.45))
def test_dpo_robust_over_swapped_labels_averages_to_the_clean_loss(d, eps):
    # Labels swapped with probability eps: the expectation of the robust loss is the loss of d.
    zero = column(0.0)

    def loss(x, **kwargs):
        return dpo_loss(column(x), zero, zero, zero, beta=0.1, **kwargs).loss.item()

    right, swapped = (loss(x, kind="robust", label_smoothing=eps) for x in (d, -d))
    assert (1 - eps) * right + eps * swapped == pytest.approx(loss(d), abs=1e-9)


def test_dpo_ipo_is_least_at_half_the_inverse_beta():
    d, zero = column(1 / (2 * 0.25), grad=True), column(0.0)
    out = dpo_loss(d, zero, zero, zero, beta=0.25, kind="ipo")
    out.loss.backward()
    assert (out.loss.item(), d.grad.item()) == (0.0, 0.0)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_dpo_loss_stays_finite_far_out(scale):
    d = torch.tensor([scale], requires_grad=True)
    zero = torch.zeros(1)
    out = dpo_loss(d, zero, zero, zero, beta=1.0)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(max(0.0, -scale))
    assert d.grad.item() == pytest.approx(0.0 if scale > 0 else -1.0)


@pytest.mark.parametrize("kind", ["hinge", "ipo"])
def test_dpo_refuses_label_smoothing_without_effect(kind):
    zero = column(0.0)
    with pytest.raises(AssertionError, match="no effect"):
        dpo_loss(zero, zero, zero, zero, beta=0.1, label_smoothing=0.1, kind=kind)


@given(numbers, numbers, st.floats(0, 5), st.floats(0, 0.1), st.floats(0, 0.49))
def test_bradley_terry_equals_the_definition(chosen, rejected, margin, center, eps):
    logit = chosen - rejected - margin
    expected = (1 - eps) * softplus(-logit) + eps * softplus(logit)
    expected += center * (chosen + rejected) ** 2
    loss = bradley_terry_loss(
        column(chosen),
        column(rejected),
        margin=column(margin),
        center_coef=center,
        label_smoothing=eps,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_bradley_terry_by_hand():
    # sigmoid(log 3) = 3/4; centring adds 0.01 * (log 3)^2.
    chosen, rejected = column(math.log(3.0), grad=True), column(0.0, grad=True)
    loss = bradley_terry_loss(chosen, rejected, center_coef=0.01)
    assert loss.item() == pytest.approx(math.log(4 / 3) + 0.01 * math.log(3) ** 2)
    bradley_terry_loss(chosen, rejected).backward()
    # d/dx -log sigmoid(x) = sigmoid(x) - 1 = -1/4.
    assert chosen.grad.item() == pytest.approx(-0.25)
    assert rejected.grad.item() == pytest.approx(0.25)


def trl_state(**settings):
    """Give the attributes that TRL's loss methods read from their trainer."""
    gather = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda m: m
    )
    return SimpleNamespace(
        accelerator=gather,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


class TokenTable(torch.nn.Module):
    """Stand in for a language model: give the token log-probabilities it was made with."""

    def __init__(self, logprobs):
        super().__init__()
        self.logprobs = logprobs

    def forward(self, **_):
        x = self.logprobs
        return SimpleNamespace(
            log_probs=x, entropy=x * 0, mean_logits=x * 0, is_top1=torch.zeros_like(x).bool()
        )


@pytest.mark.parametrize(("kind", "eps"), [k for k in KINDS if k != ("sigmoid", 0.2)])
def test_dpo_loss_equals_trl(kind, eps):
    trl = pytest.importorskip("trl", reason="TRL is the oracle of this test")
    pairs, width, beta = 3, 6, 0.3
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 2, 4, 1, 3, 5])  # completion tokens: chosen rows, then rejected
    mask = (torch.arange(width) > 0) & (torch.arange(width) <= lengths[:, None])  # (2 * pairs, T)
    logps = -torch.rand(2 * pairs, width - 1, generator=generator).double() * mask[:, 1:]
    ref = -torch.rand(2 * pairs, generator=generator).double() * lengths
    model = TokenTable(logps)
    state = trl_state(
        model=model,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=eps,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros(2 * pairs, width, dtype=torch.long),
        "attention_mask": torch.ones(2 * pairs, width),
        "completion_mask": mask.long(),
        "ref_chosen_logps": ref[:pairs],
        "ref_rejected_logps": ref[pairs:],
    }
    theirs = trl.DPOTrainer._compute_loss(state, model, inputs, False)
    by = lengths if kind == "ipo" else torch.ones_like(lengths)
    policy, reference = logps.sum(1) / by, ref / by
    ours = dpo_loss(
        policy[:pairs],
        policy[pairs:],
        reference[:pairs],
        reference[pairs:],
        beta=beta,
        label_smoothing=eps,
        kind=kind,
    )
    assert ours.loss.mean().item() == pytest.approx(theirs.item(), rel=1e-12)


@pytest.mark.parametrize("margin", [None, [0.5, 0.0, 2.0]])
def test_bradley_terry_equals_trl(margin):
    trl = pytest.importorskip("trl", reason="TRL is the oracle of this test")
    chosen, rejected = column(1.0, -0.3, 4.0), column(0.2, 0.9, -1.0)
    logits = torch.cat([chosen, rejected])[:, None]

    class Scores(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=logits)

    model = Scores()
    state = trl_state(model=model, args=SimpleNamespace(center_rewards_coefficient=0.01))
    inputs = {"attention_mask": torch.ones(6, 2)}
    if margin is not None:
        inputs["margin"] = column(*margin)
    theirs = trl.RewardTrainer.compute_loss(state, model, inputs)
    margins = None if margin is None else column(*margin)
    ours = bradley_terry_loss(chosen, rejected, margin=margins, center_coef=0.01)
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-12)
