"""SimPO, ORPO, KTO, normalized DPO, the likelihood term and LD-DPO: definitions and TRL's code."""

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from test_normalizer import PAIRS, build, gradient
from test_preference import TokenTable, column, softplus, trl_state

from align.core.errors import DataError
from align.losses.preference import dpo_loss, kto_loss, orpo_loss, simpo_loss, tail_weights
from align.recipe.rules import idle_options
from align.recipe.schema import DpoStage, KtoStage
from align.stages import dpo, kto
from align.stages.kto import KtoRow

means = st.floats(-5, -0.01)


def stage(**options):
    return DpoStage(kind="dpo", init="x", data=[{"path": "x"}], **options)


@given(means, means, st.floats(0.1, 10), st.floats(0, 3), st.floats(0, 0.49))
def test_simpo_equals_the_definition(chosen, rejected, beta, gamma, eps):
    out = simpo_loss(column(chosen), column(rejected), beta=beta, gamma=gamma, label_smoothing=eps)
    logit = beta * (chosen - rejected) - gamma
    expected = (1 - eps) * softplus(-logit) + eps * softplus(logit)
    assert out.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert out.chosen_rewards.item() == pytest.approx(beta * chosen)


@given(means, means, st.floats(0.01, 2))
def test_orpo_equals_the_definition(chosen, rejected, beta):
    out = orpo_loss(column(chosen), column(rejected), beta=beta)
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (chosen, rejected)]
    expected = -chosen + beta * softplus(-math.log(odds[0] / odds[1]))
    assert out.loss.item() == pytest.approx(expected, rel=1e-9)


def test_orpo_of_a_certain_answer_is_finite():
    chosen = column(0.0, -1e-9, grad=True)
    loss = orpo_loss(chosen, column(-1.0, 0.0), beta=0.5).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all()


@given(st.floats(-9, 9), st.floats(-9, 9), st.booleans(), st.floats(0, 3))
def test_kto_equals_the_definition(policy, ref, good, kl):
    out = kto_loss(
        column(policy),
        column(ref),
        torch.tensor([good]),
        kl=kl,
        beta=0.3,
        desirable_weight=1.5,
        undesirable_weight=0.5,
    )
    z = 0.3 * (policy - ref - kl) * (1 if good else -1)
    expected = (1.5 if good else 0.5) * (1 - 1 / (1 + math.exp(-z)))
    assert out.item() == pytest.approx(expected, rel=1e-9)


def test_kto_gradient_raises_good_answers_and_lowers_bad_ones():
    policy = column(-3.0, -3.0, grad=True)
    kto_loss(
        policy, column(-3.0, -3.0), torch.tensor([True, False]), kl=0.0, beta=0.4
    ).sum().backward()
    # The slope of a sigmoid at 0 is 1/4.
    assert policy.grad.tolist() == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_reference_free_losses_raise_chosen_and_lower_rejected(loss):
    chosen, rejected = column(-1.0, grad=True), column(-1.0, grad=True)
    fn = partial(simpo_loss, gamma=0.5) if loss == "simpo" else orpo_loss
    fn(chosen, rejected, beta=0.5).loss.backward()
    assert chosen.grad.item() < 0.0 < rejected.grad.item()


def test_tail_weights_by_hand():
    # Answers of 3 and 1 tokens, then of 1 and 2; the prompt's tokens are masked.
    mask = torch.tensor([0, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
    ids = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3, 3])
    found = tail_weights(mask, ids, 4, alpha=0.25)
    assert found.tolist() == [0.0, 1.0, 0.25, 0.25, 1.0, 0.0, 1.0, 1.0, 0.25]


# Completion tokens of three chosen and three rejected answers, as TRL lays them out.
LENGTHS = torch.tensor([5, 2, 4, 1, 3, 5])
WIDTH = 6
MASK = (torch.arange(WIDTH) > 0) & (torch.arange(WIDTH) <= LENGTHS[:, None])


def made_up(seed=1):
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(6, WIDTH - 1, generator=generator).double() * MASK[:, 1:]
    return logps, -torch.rand(6, generator=generator).double() * LENGTHS


class Table(torch.nn.Module):
    """Give the packed log-probabilities of three pairs where a model is asked for them."""

    def __init__(self, logps):
        super().__init__()
        self.logps = logps

    def forward(self, input_ids, position_ids, mask):
        rows = [self.logps[k][: LENGTHS[k]] for pair in range(3) for k in (pair, pair + 3)]
        return SimpleNamespace(logprobs=torch.cat(rows).unsqueeze(0))


def ours(spec, logps, ref):
    """Give the stage's own loss over the three pairs."""
    ids = torch.cat(
        [
            torch.full((int(LENGTHS[k]),), 2 * p + s)
            for p in range(3)
            for s, k in ((0, p), (1, p + 3))
        ]
    )
    ones = torch.ones(1, len(ids), dtype=torch.bool)
    refs = torch.stack([ref[:3], ref[3:]], 1).flatten()
    batch = dpo.PackedBatch(
        input_ids=ones.long(),
        position_ids=ones.long(),
        mask=ones,
        segment_ids=ids,
        num=6,
        counts={"pairs": 3.0},
        per_sequence={"ref": refs},
    )
    return dpo.preference_loss(spec, Table(logps), batch)[0].item()


def trl_dpo(trl, logps, ref, **settings):
    model = TokenTable(logps)
    state = trl_state(
        model=model,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=0.3,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        label_smoothing=0.0,
        **({"ld_alpha": None, "loss_weights": [1.0]} | settings),
    )
    inputs = {
        "input_ids": torch.zeros(6, WIDTH, dtype=torch.long),
        "attention_mask": torch.ones(6, WIDTH),
        "completion_mask": MASK.long(),
        "ref_chosen_logps": ref[:3],
        "ref_rejected_logps": ref[3:],
    }
    return trl.DPOTrainer._compute_loss(state, model, inputs, False).item()


def test_normalized_dpo_and_ld_dpo_equal_trl():
    trl = pytest.importorskip("trl", reason="TRL is the oracle of this test")
    logps, ref = made_up()
    theirs = trl_dpo(trl, logps, ref, loss_types=["sigmoid_norm"])
    assert ours(stage(beta=0.3, loss="sigmoid_norm"), logps, ref) == pytest.approx(theirs, rel=1e-6)
    for alpha in (0.0, 0.4, 1.0):
        theirs = trl_dpo(trl, logps, ref, loss_types=["sigmoid"], ld_alpha=alpha)
        found = ours(stage(beta=0.3, ld_alpha=alpha), logps, ref)
        assert found == pytest.approx(theirs, rel=1e-6)


def test_likelihood_term_is_the_mean_per_token_of_each_answer():
    """TRL takes the mean over all chosen tokens at once: the same where lengths are alike."""
    trl = pytest.importorskip("trl", reason="TRL is the oracle of this test")
    logps, ref = made_up()
    plain, both = (ours(stage(beta=0.3, nll_coef=c), logps, ref) for c in (0.0, 0.5))
    means = [logps[k].sum().item() / LENGTHS[k].item() for k in range(3)]
    assert both - plain == pytest.approx(-0.5 * math.fsum(means) / 3, rel=1e-6)
    alike = logps.clone()
    alike[:3] = -0.7 * MASK[:3, 1:]
    theirs = trl_dpo(trl, alike, ref, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    found = ours(stage(beta=0.3, nll_coef=0.5), alike, ref)
    assert found == pytest.approx(theirs, rel=1e-6)


def test_simpo_and_orpo_equal_trl():
    cpo = pytest.importorskip("trl.experimental.cpo", reason="TRL is the oracle of this test")
    orpo = pytest.importorskip("trl.experimental.orpo", reason="TRL is the oracle of this test")
    logps, ref = made_up()
    mean = logps.sum(1) / LENGTHS
    state = trl_state(alpha=0.0, loss_type="simpo", simpo_gamma=0.8, beta=2.0, label_smoothing=0.1)
    losses, *_ = cpo.CPOTrainer.cpo_loss(state, mean[:3], mean[3:])
    spec = stage(beta=2.0, loss="simpo", gamma=0.8, label_smoothing=0.1)
    assert ours(spec, logps, ref) == pytest.approx(losses.mean().item(), rel=1e-6)
    losses, *_ = orpo.ORPOTrainer.odds_ratio_loss(trl_state(beta=0.3), mean[:3], mean[3:])
    expected = -mean[:3].mean() - losses.mean()
    assert ours(stage(beta=0.3, loss="orpo"), logps, ref) == pytest.approx(
        expected.item(), rel=1e-5
    )


@pytest.mark.parametrize("shift", [0.5, -0.5])  # above and below the clamp at 0
def test_kto_equals_trl(shift):
    trl = pytest.importorskip("trl", reason="TRL is the oracle of this test")
    logps, ref = made_up()
    other, _ = made_up(7)
    other_ref = other.sum(1) - shift
    good = torch.tensor([True, False, True, True, False, False])
    model = TokenTable(logps)
    state = trl_state(
        model=model,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        beta=0.3,
        loss_type="kto",
        desirable_weight=1.2,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda *_: other.sum(1),
    )
    inputs = {
        "input_ids": torch.zeros(6, WIDTH, dtype=torch.long),
        "attention_mask": torch.ones(6, WIDTH),
        "completion_mask": MASK.long(),
        "label": good,
        "ref_logps": ref,
        "ref_KL_logps": other_ref,
    }
    theirs = trl.KTOTrainer._compute_loss(state, model, inputs, False)
    kl = max(float((other.sum(1) - other_ref).mean()), 0.0)
    found = kto_loss(
        logps.sum(1), ref, good, kl=kl, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7
    )
    assert found.mean().item() == pytest.approx(theirs.item(), rel=1e-9)


KINDS = [
    {"loss": "sigmoid_norm"},
    {"loss": "simpo", "gamma": 0.2},
    {"loss": "orpo"},
    {"nll_coef": 0.5},
    {"ld_alpha": 0.3},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("split", [[[0], [1], [2]], [[2, 0], [], [1]]])
def test_pair_gradients_do_not_depend_on_the_split(options, split):
    loss_fn = partial(dpo.preference_loss, stage(beta=0.3, **options))
    rows = [dpo.ReferencePair(p, -1.0 - i, -2.0) for i, p in enumerate(PAIRS)]
    whole = gradient([dpo.collate(rows, rows)], loss_fn)
    parts = gradient([dpo.collate([rows[i] for i in part], rows) for part in split], loss_fn)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)


def judged():
    sides = [(p.chosen, p.rejected) for p in PAIRS]
    rows = [
        KtoRow(r.input_ids, r.trained, good=good)
        for c, d in sides
        for r, good in ((c, True), (d, False))
    ]
    return kto.mismatch(rows, max_length=8)


def test_mismatched_answers_stand_behind_another_prompt():
    rows = judged()
    # Both answers to a prompt stand side by side: the next row of another prompt is 2 or 1 away.
    assert rows[0].mismatched.input_ids == (3, 5, *PAIRS[1].chosen.input_ids[1:])
    assert rows[1].mismatched.input_ids == (3, 5, *PAIRS[1].chosen.input_ids[1:])
    assert rows[5].mismatched.input_ids == (1, 8, 3, *PAIRS[0].chosen.input_ids[2:])
    assert rows[5].mismatched.trained == (False,) * 3 + (True,) * 3
    assert len(kto.mismatch(judged(), max_length=4)[5].mismatched.input_ids) == 4
    with pytest.raises(DataError, match="same prompt"):
        kto.mismatch(rows[:2], max_length=8)


@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[5, 0], [], [1, 2, 3], [4]]])
def test_kto_gradient_is_that_of_float64_one_answer_at_a_time(split):
    spec = KtoStage(kind="kto", init="x", data=[{"path": "x"}], beta=0.3, desirable_weight=1.5)
    rows = [kto.replace(r, ref=-3.0 - i) for i, r in enumerate(judged())]
    kl = 0.8
    batches = [kto.collate([rows[i] for i in part], rows) for part in split]
    batches = [kto.replace(b, counts={**b.counts, "kl": kl}) for b in batches]
    found = gradient(batches, partial(kto.labeled_loss, spec))
    model, total = build(), 0.0
    for row in rows:
        logits = model.model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        at = [t for t in range(1, len(row.input_ids)) if row.trained[t]]
        ratio = sum(logits[t - 1, row.input_ids[t]] for t in at) - row.ref
        value = torch.sigmoid(0.3 * (ratio - kl) * (1 if row.good else -1))
        total = total + (1.5 if row.good else 1.0) * (1 - value) / 6
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"loss": "orpo", "nll_coef": 0.1}, "nll_coef"),
        ({"loss": "simpo", "ld_alpha": 0.5}, "ld_alpha"),
        ({"loss": "sigmoid", "gamma": 0.5}, "gamma"),
        ({"loss": "orpo", "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_settings_without_effect_are_refused(options, key):
    ((found, reason),) = idle_options(stage(**options))
    assert (found, reason) == (key, f"has no effect with loss {options['loss']}; remove it")


def test_normalized_dpo_is_the_sigmoid_of_means():
    values = [column(x) for x in (-1.0, -2.0, -1.5, -1.75)]
    a, b = (dpo_loss(*values, beta=0.5, kind=k).loss.item() for k in ("sigmoid", "sigmoid_norm"))
    assert a == b == pytest.approx(softplus(-0.5 * ((-1.0 + 1.5) - (-2.0 + 1.75))))
