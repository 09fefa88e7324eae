"""Cross-entropy of classes, and what is said of predictions, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from align.evaluation.classes import class_scores, macro_f1, macro_f1_interval
from align.losses.supervised import class_loss

LN = math.log
# Probabilities (1/2, 1/4, 1/4) and (1/10, 1/10, 8/10).
LOGITS = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], dtype=torch.float64).log()


def test_loss_is_the_mean_over_the_rows_of_all_ranks():
    labels = torch.tensor([0, 1])
    # -ln 1/2 and -ln 1/10, over 4 rows of which these are two.
    expected = (LN(2.0) + LN(10.0)) / 4.0
    assert float(class_loss(LOGITS, labels, 4.0)) == pytest.approx(expected)
    parts = [class_loss(LOGITS[i : i + 1], labels[i : i + 1], 4.0) for i in (0, 1)]
    assert float(sum(parts)) == pytest.approx(expected)
    assert float(class_loss(LOGITS[:0], labels[:0], 4.0)) == 0.0


def test_smoothing_spreads_a_share_of_the_target_over_all_classes():
    # 0.7 on the label and 0.1 on each of the three classes.
    expected = 0.7 * LN(2.0) + 0.1 * (LN(2.0) + 2.0 * LN(4.0))
    found = class_loss(LOGITS[:1], torch.tensor([0]), 1.0, label_smoothing=0.3)
    assert float(found) == pytest.approx(expected)


def test_gradient_lowers_the_wrong_classes():
    logits = torch.zeros(1, 3, requires_grad=True)
    class_loss(logits, torch.tensor([2]), 1.0).backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([1 / 3, 1 / 3, -2 / 3])


def test_scores_of_a_hand_example():
    # Right: a a a b b c; taken for: a a b b c c.
    # a: 2 of 2 taken, 2 of 3 found: F1 4/5. b: 1 of 2, 1 of 2: 1/2. c: 1 of 2, 1 of 1: 2/3.
    found = class_scores([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], ["a", "b", "c"], seed=0)
    assert found["accuracy"][0] == pytest.approx(4 / 6)
    assert found["macro_f1"][0] == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    assert found["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    expected = {"precision": 1.0, "recall": 2 / 3, "f1": 4 / 5, "support": 3}
    assert found["classes"]["a"] == pytest.approx(expected)
    low, high = found["macro_f1"][1:]
    assert 0.0 <= low < found["macro_f1"][0] < high <= 1.0


def test_a_class_that_never_appears_is_left_out_of_macro_f1():
    found = class_scores([0, 1], [0, 1], ["a", "b", "c"], seed=0)
    assert found["macro_f1"] == [1.0, 1.0, 1.0]
    assert found["classes"]["c"] == {"precision": None, "recall": None, "f1": None, "support": 0}


def test_interval_is_that_of_rows_drawn_one_by_one():
    labels = np.array([0] * 40 + [1] * 20)
    chosen = np.where(np.arange(60) % 5 == 0, 1 - labels, labels)
    confusion = np.zeros((2, 2), dtype=np.int64)
    np.add.at(confusion, (labels, chosen), 1)
    rng = np.random.default_rng(1)
    drawn = []
    for rows in rng.integers(60, size=(4000, 60)):
        one = np.zeros((2, 2), dtype=np.int64)
        np.add.at(one, (labels[rows], chosen[rows]), 1)
        drawn.append(float(macro_f1(one)))
    found = macro_f1_interval(confusion, seed=0, num_draws=4000)
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.015)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.015)
