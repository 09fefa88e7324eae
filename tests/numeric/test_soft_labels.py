"""Probable labels in the losses: limits, symmetry, and the gradient against finite differences."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from engine_models import save_tiny, tiny_model

from align.core.errors import DataError
from align.core.types import PairRow, TokenRow
from align.data.formats.detect import to_examples
from align.losses.preference import bradley_terry_loss, dpo_loss, soft_labels
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import DpoStage, RewardStage
from align.stages import dpo
from align.stages.reward import tasks as scorer_rows
from align.stages.sft import collate, sft_loss


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


def words(*ids, start=2):
    return TokenRow(ids, tuple(t >= start for t in range(len(ids))))


def test_the_loss_of_sft_is_weighted_by_row_and_its_count_too():
    rows = [replace(words(3, 9, 4, 21), label_prob=0.25), words(5, 8, 30)]
    plain = tiny_model(1, tied=True).double()
    total = 0.0
    for row in rows:
        logprobs = plain(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for t in range(2, len(row.input_ids)):
            total -= row.label_prob * logprobs[t - 1, row.input_ids[t]]
    model = LogprobModel(tiny_model(1, tied=True))
    loss, _ = sft_loss(model, collate(rows, rows))
    assert loss.item() == pytest.approx((total / (0.25 * 2 + 1)).item(), rel=1e-5)


def test_rows_without_any_weight_train_nothing_and_break_nothing():
    """The count is 0 for a batch of nothing but labels that are certainly wrong."""
    nothing = [replace(words(3, 9, 4, 21), label_prob=0.0), replace(words(5, 8), label_prob=0.0)]
    model = LogprobModel(tiny_model(1, tied=True))
    loss, _ = sft_loss(model, collate(nothing, nothing))
    loss.backward()
    assert loss.item() == 0.0
    assert all((p.grad == 0.0).all() for p in model.parameters() if p.grad is not None)
    # Beside another row they count neither in the sum nor in the denominator.
    row = words(5, 8, 30)
    alone, beside = (
        sft_loss(model, collate(rows, rows))[0].item() for rows in ([row], [*nothing, row])
    )
    assert beside == pytest.approx(alone, rel=1e-6)


def mixed(loss_of, pair, prob):
    """Mix the loss of a certain pair with that of the same pair the other way round."""
    turned = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
    return prob * loss_of(pair).item() + (1 - prob) * loss_of(turned).item()


PAIR = PairRow(words(3, 9, 4, 21), words(3, 9, 30), num_prompt_tokens=2, source="a:1")


@pytest.mark.parametrize(
    "changes", [{}, {"nll_coef": 0.3}, {"loss": "ipo"}, {"loss": "simpo"}, {"loss": "orpo"}]
)
def test_an_unsure_pair_of_dpo_pulls_both_ways(tmp_path, changes):
    spec = DpoStage.model_validate(
        {"kind": "dpo", "init": "x", "data": [{"path": "x"}], "beta": 0.5, **changes}
    )
    # As a stage loads it: the two answers of a pair share their prompt.
    model = LogprobModel(
        load_policy(save_tiny(tiny_model(1, tied=True), tmp_path), dtype="float32")
    )
    reference = {PAIR.chosen: -9.0, PAIR.rejected: -5.0}

    def loss_of(pair):
        row = dpo.ReferencePair(pair, reference[pair.chosen], reference[pair.rejected])
        return dpo.preference_loss(spec, model, dpo.collate([row], [row]))[0]

    unsure = loss_of(replace(PAIR, label_prob=0.8)).item()
    assert unsure == pytest.approx(mixed(loss_of, PAIR, 0.8), rel=1e-5)
    assert unsure != pytest.approx(loss_of(PAIR).item(), rel=1e-3)


def test_an_unsure_pair_of_a_reward_model_pulls_both_ways():
    spec = RewardStage.model_validate({"kind": "reward", "init": "x", "data": [{"path": "x"}]})
    torch.manual_seed(0)
    values = torch.nn.Embedding(64, 1)

    def loss_of(pair):
        rows = [scorer_rows.WeightedPair(pair, (1.0,))]
        batch = scorer_rows.collate_pairs(rows, rows)
        return scorer_rows.pair_loss(spec, lambda ids, _: values(ids), batch)[0]

    unsure = loss_of(replace(PAIR, label_prob=0.8)).item()
    assert unsure == pytest.approx(mixed(loss_of, PAIR, 0.8), rel=1e-5)
    assert unsure != pytest.approx(loss_of(PAIR).item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["unpaired", "steps"])
def test_a_probable_label_where_labels_count_as_certain_is_refused(kind):
    row = {"prompt": "q", "label_prob": 0.7, "completion": "a", "label": True}
    if kind == "steps":
        row = {"prompt": "q", "label_prob": 0.7, "steps": [{"text": "s", "label": True}]}
    with pytest.raises(DataError, match=f"label_prob has no effect on {kind} rows"):
        to_examples(row, kind=kind, format="auto", source="a:1")


def test_a_pair_keeps_its_probability_when_its_prompt_is_cut():
    from align.data.fit import fit_rows

    def side(x):
        return TokenRow((1, 2, 3, x), (False, False, False, True))

    pair = PairRow(side(4), side(5), num_prompt_tokens=3, margin=0.5, source="a:1", label_prob=0.7)
    (fitted,), _ = fit_rows([pair], max_length=3, max_lost_frac=0.0, what="pairs")
    assert (fitted.num_prompt_tokens, fitted.margin, fitted.label_prob) == (2, 0.5, 0.7)
