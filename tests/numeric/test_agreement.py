"""The label model against votes drawn from known judges, and one step by hand."""

import numpy as np
import pytest

from align.data.text.label_model import ABSTAIN, dawid_skene


def drawn(seed, rows, rights, coverage=1.0):
    dice = np.random.default_rng(seed)
    truth = dice.integers(0, 2, rows)
    votes = np.empty((rows, len(rights)), dtype=np.int64)
    for j, right in enumerate(rights):
        ok = dice.random(rows) < right
        votes[:, j] = np.where(ok, truth, 1 - truth)
        votes[dice.random(rows) >= coverage, j] = ABSTAIN
    return truth, votes


def test_reliabilities_are_recovered_and_beat_the_majority():
    rights = (0.92, 0.75, 0.65, 0.6, 0.6)
    truth, votes = drawn(0, 8000, rights)
    model = dawid_skene(votes)
    assert [model.accuracy(j) for j in range(5)] == pytest.approx(rights, abs=0.03)
    assert model.prior == pytest.approx(truth.mean(), abs=0.03)
    hard = model.probabilities > 0.5
    majority = (votes == 1).sum(1) > 2
    assert (hard == truth).mean() > (majority == truth).mean() + 0.05
    # Calibration: among rows said to be 1 with p, the share of ones is p.
    sure = model.probabilities > 0.9
    assert truth[sure].mean() == pytest.approx(model.probabilities[sure].mean(), abs=0.03)


def test_abstentions_say_nothing():
    _, votes = drawn(1, 3000, (0.9, 0.8, 0.8), coverage=0.6)
    model = dawid_skene(votes)
    assert [model.accuracy(j) for j in range(3)] == pytest.approx((0.9, 0.8, 0.8), abs=0.05)
    nobody = (votes == ABSTAIN).all(1)
    assert nobody.any()
    assert model.probabilities[nobody] == pytest.approx(model.prior, abs=1e-6)
    always = np.concatenate([votes, np.full((len(votes), 1), ABSTAIN)], axis=1)
    assert dawid_skene(always).probabilities == pytest.approx(model.probabilities, abs=1e-9)


def test_posterior_is_bayes_rule_on_the_estimated_tables():
    _, votes = drawn(2, 300, (0.9, 0.7, 0.6))
    model = dawid_skene(votes)
    for i in range(20):
        one, zero = model.prior, 1 - model.prior
        for j, vote in enumerate(votes[i]):
            one *= model.tables[j, 1, vote]
            zero *= model.tables[j, 0, vote]
        assert model.probabilities[i] == pytest.approx(one / (one + zero), abs=1e-6)


def test_exchanging_the_labels_exchanges_the_answer():
    _, votes = drawn(3, 500, (0.9, 0.7, 0.8), coverage=0.8)
    swapped = np.where(votes == ABSTAIN, ABSTAIN, 1 - votes)
    found = dawid_skene(swapped).probabilities
    assert found == pytest.approx(1 - dawid_skene(votes).probabilities, abs=1e-6)
