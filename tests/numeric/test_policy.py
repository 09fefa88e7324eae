"""The clipped policy loss and the importance weights against hand numbers and enumeration."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.policy import (
    cispo_policy_loss,
    clipped_policy_loss,
    gspo_policy_loss,
    importance_weights,
    policy_ratio,
)
from align.losses.reduce import token_mean

NAN = float("nan")
DAPO = {"clip_low": 0.2, "clip_high": 0.28}


def one_token(ratio, advantage, **options):
    """Give loss, gradient with respect to the log-probability and clip of a single token."""
    old = torch.tensor([-1.5], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    advantages = torch.tensor([advantage], dtype=torch.float64)
    mask = torch.tensor([True])
    out = clipped_policy_loss(logprobs, old, advantages, mask, **{**DAPO, **options})
    out.loss.sum().backward()
    return out.loss.item(), logprobs.grad.item(), out.clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),  # the plain policy gradient, -A
        (1.1, 1.0, -1.1, -1.1, False),
        (1.25, 1.0, -1.25, -1.25, False),  # above 1.2, inside the higher upper bound
        (1.5, 2.0, -2.56, 0.0, True),  # min(3, 1.28 * 2)
        (1.5, -2.0, 3.0, 3.0, False),  # min(-3, -2.56): moving back is never clipped
        (0.5, 2.0, -1.0, -1.0, False),  # min(1, 0.8 * 2)
        (0.5, -2.0, 1.6, 0.0, True),  # min(-1, 0.8 * -2)
        (5.0, -1.0, 5.0, 5.0, False),
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, gradient, clipped):
    got = one_token(ratio, advantage)
    assert got == (pytest.approx(loss), pytest.approx(gradient), clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (5.0, -1.0, 3.0, 0.0, True),  # -max(min(-5, -1.28), 3 * -1)
        (2.0, -1.0, 2.0, 2.0, False),  # inside the second bound
        (1.1, 1.0, -1.1, -1.1, False),
        (5.0, 1.0, -1.28, 0.0, True),  # a positive advantage has only the first
    ],
)
def test_policy_loss_dual_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    got = one_token(ratio, advantage, dual_clip=3.0)
    assert got == (pytest.approx(loss), pytest.approx(gradient), clipped)


def test_policy_loss_gradient_sign_follows_the_advantage():
    logprobs = torch.full((2,), -1.0, requires_grad=True)
    mask = torch.tensor([True, True])
    advantages = torch.tensor([0.7, -0.7])
    clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask, **DAPO).loss.sum().backward()
    # Descent raises the probability of the good token and lowers that of the bad one.
    assert logprobs.grad[0].item() < 0.0 < logprobs.grad[1].item()


def test_policy_loss_gradient_over_all_tokens_is_that_of_the_expected_advantage():
    logits = torch.tensor([0.3, -1.0, 0.6], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    probs = logits.softmax(0)
    (exact,) = torch.autograd.grad(-(probs * advantages).sum(), logits)
    logprobs = logits.log_softmax(0)
    mask = torch.ones(3, dtype=torch.bool)
    per_token = clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask, **DAPO).loss
    (sampled,) = torch.autograd.grad((probs.detach() * per_token).sum(), logits)
    torch.testing.assert_close(sampled, exact)


def test_policy_loss_masked_tokens_have_neither_value_nor_gradient():
    logprobs = torch.tensor([[-1.0, NAN, -500.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.2, NAN, 400.0, -2.0]])
    advantages = torch.tensor([[1.0, NAN, 9.0, 1.0]])
    mask = torch.tensor([[True, False, False, True]])
    out = clipped_policy_loss(logprobs, old, advantages, mask, **DAPO)
    token_mean(out.loss, mask, 2).backward()
    assert out.loss[0, 1:3].tolist() == [0.0, 0.0]
    assert out.ratio[0, 1:3].tolist() == [1.0, 1.0]
    assert out.clipped[0, 1:3].tolist() == [False, False]
    assert logprobs.grad[0, 1:3].tolist() == [0.0, 0.0]
    assert logprobs.grad[0, [0, 3]].isfinite().all()


def test_no_policy_loss_sends_gradient_into_advantages_or_old_logprobs_of_a_weight():
    ids = {"segment_ids": torch.zeros(3, dtype=torch.long), "num_segments": 1}
    mask = torch.ones(3, dtype=torch.bool)
    for loss_fn, options in (
        (clipped_policy_loss, {}),
        (gspo_policy_loss, ids),
        (cispo_policy_loss, {}),
    ):
        new, old = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.1, -1.9, -0.5])
        new.requires_grad_()
        advantages = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
        out = loss_fn(new, old, advantages, mask, clip_low=0.2, clip_high=0.2, **options)
        out.loss.sum().backward()
        assert advantages.grad is None
        assert (new.grad != 0.0).all()
        assert not out.ratio.requires_grad
    old, rollout = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    assert not importance_weights(old, rollout, mask, mode="truncate", cap=2.0).requires_grad


def test_policy_loss_stays_finite_when_the_policy_has_run_away():
    logprobs = torch.tensor([0.0], requires_grad=True)
    mask = torch.tensor([True])
    old, advantages = torch.tensor([-500.0]), torch.tensor([-1.0])
    loss = clipped_policy_loss(logprobs, old, advantages, mask, **DAPO).loss
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.exp(20.0), rel=1e-5)
    assert logprobs.grad.isfinite().all()


@given(
    st.lists(
        st.tuples(st.floats(-3, 0), st.floats(-3, 0), st.floats(-2, 2), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    st.randoms(use_true_random=False),
)
def test_policy_loss_does_not_depend_on_token_order_or_layout(tokens, random):
    order = random.sample(range(len(tokens)), len(tokens))

    def total(rows):
        columns = (torch.tensor(c, dtype=torch.float64) for c in list(zip(*rows, strict=True))[:3])
        mask = torch.tensor([row[3] for row in rows])
        return clipped_policy_loss(*columns, mask, **DAPO).loss.sum().item()

    whole = total(tokens)
    padding = [(NAN, NAN, NAN, False)] * 2
    assert total([tokens[i] for i in order]) == pytest.approx(whole, abs=1e-9)
    assert total(padding + tokens) == pytest.approx(whole, abs=1e-9)
    expected = 0.0
    for new, old, advantage, keep in tokens:
        ratio = math.exp(new - old)
        held = min(max(ratio, 0.8), 1.28)
        expected -= min(ratio * advantage, held * advantage) if keep else 0.0
    assert whole == pytest.approx(expected, abs=1e-9)


def test_policy_ratio_is_one_and_carries_the_gradient():
    logprobs = torch.tensor([-2.0, NAN], requires_grad=True)
    ratio = policy_ratio(logprobs, logprobs.detach(), torch.tensor([True, False]))
    ratio.sum().backward()
    assert ratio.tolist() == [1.0, 1.0]
    assert logprobs.grad.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        ("truncate", [0.25, 0.6, 1.0, 1.9, 2.0, 0.0]),
        ("mask", [0.0, 0.6, 1.0, 1.9, 0.0, 0.0]),
    ],
)
def test_importance_weights_by_hand(mode, expected):
    # trainer / sampler = 0.25, 0.6, 1, 1.9, 4 and a masked token; cap 2, so the band is [0.5, 2].
    old = torch.tensor([0.025, 0.06, 0.1, 0.19, 0.4, 1.0]).log().requires_grad_()
    sampler = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, NAN]).log()
    mask = torch.tensor([True] * 5 + [False])
    weights = importance_weights(old, sampler, mask, mode=mode, cap=2.0)
    assert weights.tolist() == pytest.approx(expected, rel=1e-5)
    assert not weights.requires_grad


def test_importance_weights_turn_the_samplers_mean_into_the_trainers():
    trainer = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    sampler = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    values = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)
    mask = torch.ones(3, dtype=torch.bool)
    weights = importance_weights(trainer.log(), sampler.log(), mask, mode="truncate", cap=10.0)
    assert (sampler * weights * values).sum().item() == pytest.approx(0.7 - 0.6 + 0.2)


def test_policy_loss_refuses_settings_that_make_no_sense():
    x, mask = torch.zeros(1), torch.tensor([True])
    with pytest.raises(AssertionError, match="clip_low"):
        clipped_policy_loss(x, x, x, mask, clip_low=1.1, clip_high=0.2)
    with pytest.raises(AssertionError, match="dual_clip"):
        clipped_policy_loss(x, x, x, mask, **DAPO, dual_clip=0.5)
    with pytest.raises(AssertionError, match="importance mode"):
        importance_weights(x, x, mask, mode="clip", cap=2.0)
