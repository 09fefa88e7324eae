"""The KL estimators against full enumeration of a 3-token vocabulary, and the controllers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from align.core.errors import TrainingError
from align.losses.kl import AdaptiveKL, FixedKL, kl_estimate
from align.recipe.schema.common import KlSpec

LOGITS = (0.4, -0.9, 0.1)
REFERENCE = (0.5, 0.2, 0.3)


def enumerate_vocabulary(logits=LOGITS):
    """Give policy logits with gradient, its log-probabilities and those of the reference."""
    theta = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    return theta, theta.log_softmax(0), torch.tensor(REFERENCE, dtype=torch.float64).log()


def plain_kl(p, q):
    """Give KL(p || q) in float64 plain Python."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(
    ("kind", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)]
)
def test_kl_estimate_by_hand(kind, expected):
    # x = -1 - (-1.5) = 0.5: k1 = x, k2 = x^2 / 2, k3 = e^-x - 1 + x.
    x = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), kind)
    assert x.item() == pytest.approx(expected)


@given(st.tuples(*[st.floats(-4, 4)] * 3))
def test_kl_k1_and_k3_have_the_divergence_as_their_mean(logits):
    _, logprobs, ref = enumerate_vocabulary(logits)
    probs = logprobs.exp().tolist()
    exact = plain_kl(probs, REFERENCE)
    for kind in ("k1", "k3"):
        estimate = kl_estimate(logprobs, ref, kind).tolist()
        mean = math.fsum(p * k for p, k in zip(probs, estimate, strict=True))
        assert mean == pytest.approx(exact, abs=1e-12)


def test_kl_k2_is_a_biased_value():
    _, logprobs, ref = enumerate_vocabulary()
    probs = logprobs.exp()
    exact = plain_kl(probs.tolist(), REFERENCE)
    mean = (probs * kl_estimate(logprobs, ref, "k2")).sum().item()
    assert abs(mean - exact) > 0.01 * exact


@given(st.tuples(*[st.floats(-4, 4)] * 3))
def test_kl_gradients_as_a_loss_equal_autograd_of_the_exact_divergences(logits):
    theta, logprobs, ref = enumerate_vocabulary(logits)
    probs = logprobs.exp()
    reverse = (probs * (logprobs - ref)).sum()
    forward = (ref.exp() * (ref - logprobs)).sum()
    expected = {
        "k1": torch.zeros(3, dtype=torch.float64),
        "k2": torch.autograd.grad(reverse, theta, retain_graph=True)[0],
        "k3": torch.autograd.grad(forward, theta, retain_graph=True)[0],
    }
    for kind, gradient in expected.items():
        # Sampling from the policy weighs each token by its probability, without gradient.
        loss = (probs.detach() * kl_estimate(logprobs, ref, kind)).sum()
        (got,) = torch.autograd.grad(loss, theta, retain_graph=True)
        torch.testing.assert_close(got, gradient, atol=1e-12, rtol=1e-9)


def test_kl_of_k1_alone_has_the_gradient_of_the_divergence_as_a_reward():
    """The policy gradient of -KL by enumeration; a reward is a constant to the policy gradient."""
    theta, logprobs, ref = enumerate_vocabulary()
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    (expected,) = torch.autograd.grad(exact, theta, retain_graph=True)
    apart = {}
    for kind in ("k1", "k2", "k3"):
        reward = -kl_estimate(logprobs, ref, kind).detach()
        surrogate = -(logprobs.exp().detach() * reward * logprobs).sum()
        (found,) = torch.autograd.grad(surrogate, theta, retain_graph=True)
        apart[kind] = float((found - expected).abs().max())
    assert apart["k1"] < 1e-12
    assert min(apart["k2"], apart["k3"]) > 0.05
    for kind in ("k2", "k3"):
        with pytest.raises(ValidationError, match=f"{kind} in the reward"):
            KlSpec(coef=0.1, place="reward", estimator=kind)


def test_kl_is_zero_at_the_start():
    logprobs = torch.tensor([-0.1, -7.0, -30.0])
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(logprobs, logprobs.clone(), kind).tolist() == [0.0] * 3


def test_kl_k3_keeps_its_digits_where_the_policies_nearly_agree():
    # x = 2^-13: k3 = x^2 / 2 - x^3 / 6 + ..., far below float32's resolution around 1.
    x = 2.0**-13
    k3 = kl_estimate(torch.tensor([x]), torch.tensor([0.0]), "k3").item()
    assert k3 >= 0.0
    assert k3 == pytest.approx(x * x / 2, abs=1e-11)


def test_kl_has_no_gradient_into_the_reference():
    logprobs, ref = (torch.tensor([-1.0], requires_grad=True) for _ in range(2))
    kl_estimate(logprobs, ref * 2.0, "k3").sum().backward()
    assert ref.grad is None


def test_kl_refuses_an_unknown_estimator():
    with pytest.raises(AssertionError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize(
    ("kl", "num_samples", "expected"),
    [
        (6.0, 100, 0.1),  # on target
        (6.6, 100, 0.101),  # 10 % above, a tenth of the horizon: + 1 %
        (12.0, 100, 0.102),  # clipped to 20 %
        (0.0, 100, 0.098),
        (0.0, 50_000, 0.08),  # a batch beyond the horizon moves it by 20 %, not below zero
    ],
)
def test_adaptive_kl_by_hand(kl, num_samples, expected):
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(kl, num_samples)
    assert controller.coef == pytest.approx(expected)


def test_adaptive_kl_resumes_where_it_was():
    whole, first = (AdaptiveKL(0.1, target=6.0, horizon=1000) for _ in range(2))
    for controller in (whole, first):
        controller.update(9.0, 100)
    second = AdaptiveKL(0.1, target=6.0, horizon=1000)
    second.load_state_dict(first.state_dict())
    for controller in (whole, second):
        controller.update(2.0, 300)
    assert second.coef == whole.coef != 0.1


def test_adaptive_kl_stops_on_a_number_that_is_none():
    with pytest.raises(TrainingError, match="nan"):
        AdaptiveKL(0.1, target=6.0, horizon=1000).update(float("nan"), 10)


def test_fixed_kl_stays():
    controller = FixedKL(0.3)
    controller.update(100.0, 1000)
    restored = FixedKL(0.1)
    restored.load_state_dict(controller.state_dict())
    assert controller.coef == restored.coef == 0.3
