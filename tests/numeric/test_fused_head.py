"""The fused head against plain log-softmax with autograd."""

import pytest
import torch
from torch import Tensor

import align.models.fused_head as module
from align.models.fused_head import head_logprobs


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).float() / temperature
    return logits.log_softmax(-1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("kept", [0, 2**24])
@pytest.mark.parametrize("rows_of_chunk", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_head_equals_autograd(monkeypatch, kept, rows_of_chunk, temperature):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 23 * rows_of_chunk)
    monkeypatch.setattr(module, "KEPT_ELEMENTS", kept)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 5, requires_grad=True) for n in (8, 23))
    labels, share = torch.randint(0, 23, (8,)), torch.randn(8)
    found, entropy = head_logprobs(hidden, weight, labels, temperature=temperature, entropy=True)
    expected = plain(hidden, weight, labels, temperature)
    torch.testing.assert_close(found, expected)
    probs = (hidden @ weight.T / temperature).softmax(-1)
    torch.testing.assert_close(entropy, -(probs * probs.log()).sum(-1))
    assert not entropy.requires_grad
    for mine, slow in zip(
        torch.autograd.grad((found * share).sum(), (hidden, weight)),
        torch.autograd.grad((expected * share).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, slow)


def test_fused_head_trains_hidden_states_under_a_frozen_weight():
    hidden, weight = torch.randn(4, 5, requires_grad=True), torch.randn(9, 5)
    labels = torch.tensor([1, 2, 3, 8])
    head_logprobs(hidden, weight, labels, temperature=1.0, entropy=False)[0].sum().backward()
    (expected,) = torch.autograd.grad(plain(hidden, weight, labels, 1.0).sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected)


def test_fused_head_takes_no_rows():
    hidden, weight = torch.zeros(0, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    values, _ = head_logprobs(hidden, weight, none, temperature=1.0, entropy=False)
    values.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(9, 5))
