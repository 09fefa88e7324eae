"""Probable labels in the losses: limits, symmetry, and the gradient against finite differences."""

import math
from functools import partial

import pytest
import torch

from align.core.types import PairRow, TokenRow
from align.losses.preference import bradley_terry_loss, dpo_loss, soft_labels
from align.stages.sft import collate


def test_soft_bradley_terry_is_the_cross_entropy_against_the_probability():
    chosen, rejected = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.5])
    prob = torch.tensor([0.8, 0.3])
    found = soft_labels(
        bradley_terry_loss(chosen, rejected), bradley_terry_loss(rejected, chosen), prob
    )
    for k, (d, p) in enumerate([(0.8, 0.8), (-1.0, 0.3)]):
        sure = 1 / (1 + math.exp(-d))
        wanted = -(p * math.log(sure) + (1 - p) * math.log(1 - sure))
        assert found[k].item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust"])
def test_certain_labels_change_nothing_and_a_coin_pulls_to_neither_side(kind):
    pairs = [torch.tensor(x, dtype=torch.float64) for x in ([-3.0], [-4.0], [-3.5], [-3.2])]
    pairs[0].requires_grad_()
    objective = partial(dpo_loss, beta=0.5, kind=kind)
    a, b, ref_a, ref_b = pairs
    loss = objective(a, b, ref_a, ref_b).loss
    turned = objective(b, a, ref_b, ref_a).loss
    assert torch.equal(soft_labels(loss, turned, torch.ones(1)), loss)
    same = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    even = soft_labels(
        objective(same, b * 0 - 3.0, same.detach(), same.detach()).loss,
        objective(b * 0 - 3.0, same, same.detach(), same.detach()).loss,
        torch.full((1,), 0.5),
    )
    (gradient,) = torch.autograd.grad(even.sum(), same)
    assert gradient.item() == pytest.approx(0.0, abs=1e-12)


def test_sft_rows_weigh_as_much_as_their_label_is_probable():
    rows = [
        TokenRow((5, 6, 7), (False, True, True), label_prob=0.25),
        TokenRow((5, 8), (False, True)),
    ]
    batch = collate(rows, rows)
    assert batch.counts["tokens"] == 0.25 * 2 + 1
    assert batch.per_token["weight"].tolist() == [[0.25, 0.25, 0.25, 1.0, 1.0]]


def test_a_pair_keeps_its_probability_when_its_prompt_is_cut():
    from align.data.load import fit_rows

    def side(x):
        return TokenRow((1, 2, 3, x), (False, False, False, True))

    pair = PairRow(side(4), side(5), num_prompt_tokens=3, margin=0.5, source="a:1", label_prob=0.7)
    (fitted,), _ = fit_rows([pair], max_length=3, max_lost_frac=0.0, what="pairs")
    assert (fitted.num_prompt_tokens, fitted.margin, fitted.label_prob) == (2, 0.5, 0.7)
