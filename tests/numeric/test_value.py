"""The critic's loss against hand numbers."""

import pytest
import torch

from align.losses.reduce import token_mean
from align.losses.value import clipped_value_loss

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
@pytest.mark.parametrize("old_value", [0.0, 3.0])
def test_value_loss_by_hand(value, returned, loss, gradient, old_value):
    """The numbers are for an old value of 0; only distances from it count."""
    values = torch.tensor([old_value + value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([[old_value], [old_value + returned]], dtype=torch.float64)
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
