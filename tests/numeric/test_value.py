"""The critic's loss and the explained variance against hand numbers."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.losses.reduce import token_mean
from align.losses.value import clipped_value_loss, explained_variance

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "returned", "loss", "gradient"),
    [
        (0.1, 1.0, 0.405, -0.9),  # inside the clip: 0.81 / 2, gradient V - R
        (1.0, 0.0, 0.5, 1.0),  # max(1, 0.2^2) / 2: moving back is never clipped
        (1.0, 2.0, 1.62, 0.0),  # max(1, (0.2 - 2)^2 = 3.24) / 2: the clip holds
        (-1.0, -2.0, 1.62, 0.0),
    ],
)
def test_value_loss_by_hand(value, returned, loss, gradient):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(1, dtype=torch.float64), torch.tensor([returned]).double()
    out = clipped_value_loss(values, old, returns, clip=0.2)
    out.sum().backward()
    assert (out.item(), values.grad.item()) == (pytest.approx(loss), pytest.approx(gradient))


def test_value_loss_has_no_gradient_on_masked_tokens_old_values_or_returns():
    values = torch.tensor([0.1, 5.0], requires_grad=True)
    old, returns = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    mask = torch.tensor([True, False])
    token_mean(clipped_value_loss(values, old, returns, clip=0.2), mask, 1).backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0])
    assert old.grad is None
    assert returns.grad is None


def test_explained_variance_by_hand():
    # Errors 0, 0, 1: variance 2/9; returns 1, 2, 3: variance 2/3; so 1 - 1/3.
    values = torch.tensor([[1.0, 2.0, 2.0, NAN]])
    returns = torch.tensor([[1.0, 2.0, 3.0, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(2 / 3)
    # A constant offset of the critic is not variance; the mean of the returns explains nothing.
    assert explained_variance(returns - 7.0, returns, mask).item() == pytest.approx(1.0)
    assert explained_variance(returns * 0.0 + 2.0, returns, mask).item() == pytest.approx(0.0)


def test_explained_variance_of_constant_returns_is_undefined():
    x = torch.tensor([1.0, 2.0])
    mask = torch.ones(2, dtype=torch.bool)
    assert math.isnan(explained_variance(x, torch.ones(2), mask).item())


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=10))
def test_explained_variance_equals_the_definition(pairs):
    values, returns = (list(column) for column in zip(*pairs, strict=True))
    total = statistics.pvariance(returns)
    if total < 1e-6:
        return
    errors = [r - v for v, r in pairs]
    got = explained_variance(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(returns, dtype=torch.float64),
        torch.ones(len(pairs), dtype=torch.bool),
    )
    expected = 1.0 - statistics.pvariance(errors) / total
    assert got.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
