"""Losses of scorers: ties, judged answers, judged steps; and the potentials of process rewards."""

import itertools
import math

import pytest
import torch

from align.losses.preference import bradley_terry_loss
from align.losses.scorer import answer_loss, step_loss, tie_loss
from reward_models.process import increments, potentials, step_ends


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@pytest.mark.parametrize("gap", [-2.0, 0.0, 0.7, 3.0])
def test_win_loss_and_tie_are_all_that_can_happen(gap: float):
    a, b = torch.tensor([gap], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    no, yes = torch.tensor([False]), torch.tensor([True])
    chances = [
        math.exp(-float(tie_loss(x, y, tie, tie_margin=1.1)))
        for x, y, tie in ((a, b, no), (b, a, no), (a, b, yes))
    ]
    assert sum(chances) == pytest.approx(1.0)
    assert chances[0] == pytest.approx(sigmoid(gap - 1.1))


def test_equal_answers_tie_with_the_stated_probability():
    zero = torch.zeros(1, dtype=torch.float64)
    loss = tie_loss(zero, zero, torch.tensor([True]), tie_margin=1.1)
    assert math.exp(-float(loss)) == pytest.approx(math.tanh(0.55))


def test_a_tie_pulls_scores_together_and_a_win_apart():
    for tie, sign in ((True, 1.0), (False, -1.0)):
        chosen = torch.tensor([2.0], requires_grad=True)
        rejected = torch.tensor([0.0])
        tie_loss(chosen, rejected, torch.tensor([tie]), tie_margin=1.0).sum().backward()
        assert chosen.grad is not None
        assert math.copysign(1.0, float(chosen.grad)) == sign


def test_without_a_margin_wins_are_those_of_bradley_and_terry():
    chosen, rejected = torch.tensor([0.3, -1.0]), torch.tensor([0.1, 2.0])
    none = torch.tensor([False, False])
    tied = tie_loss(chosen, rejected, none, tie_margin=1e-6, center_coef=0.01)
    plain = bradley_terry_loss(chosen, rejected, center_coef=0.01)
    torch.testing.assert_close(tied, plain, atol=1e-5, rtol=0)


def test_answers_are_weighted_by_class():
    # good: 2 log(1 + e^-1); bad: 0.5 log(1 + e^3)
    scores, good = torch.tensor([1.0, 3.0]), torch.tensor([True, False])
    found = answer_loss(scores, good, good_weight=2.0, bad_weight=0.5)
    assert found.tolist() == pytest.approx(
        [2 * math.log1p(math.exp(-1)), 0.5 * math.log1p(math.exp(3))]
    )


def test_only_the_ends_of_steps_are_trained():
    values = torch.tensor([[5.0, 0.5, -3.0, 1.0]], requires_grad=True)
    labels = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    ends = torch.tensor([[False, True, False, True]])
    loss = step_loss(values, labels, ends)
    assert loss[0].tolist() == pytest.approx(
        [0.0, math.log1p(math.exp(-0.5)), 0.0, math.log1p(math.exp(1.0))]
    )
    loss.sum().backward()
    assert values.grad is not None
    assert (values.grad != 0).tolist() == ends.tolist()


def test_potentials_by_hand():
    chances = [0.9, 0.5, 0.8]
    assert potentials(chances, "min") == [0.9, 0.5, 0.5]
    assert potentials(chances, "last") == [0.9, 0.5, 0.8]
    assert potentials(chances, "product") == pytest.approx([0.9, 0.45, 0.36])


@pytest.mark.parametrize("aggregate", ["min", "last", "product"])
def test_increments_add_up_to_the_score_and_keep_the_order(aggregate: str):
    # All solutions of one to four steps whose steps are right with one of three chances.
    found = []
    for num in range(1, 5):
        for chances in itertools.product((0.2, 0.6, 0.95), repeat=num):
            ends = [3 * k + 2 for k in range(num)]
            tokens = increments(chances, ends, aggregate=aggregate, num_tokens=3 * num)
            assert [t for t, x in enumerate(tokens) if x != 0.0 and t not in ends] == []
            found.append((sum(tokens), potentials(chances, aggregate)[-1]))
    for returned, score in found:
        assert returned == pytest.approx(score)
    by_return = sorted(range(len(found)), key=lambda i: round(found[i][0], 9))
    by_score = sorted(range(len(found)), key=lambda i: round(found[i][1], 9))
    assert by_return == by_score


def test_writing_more_steps_does_not_pay_where_a_plain_sum_would():
    short, padded = [0.9], [0.9] * 10
    assert sum(padded) > 5 * sum(short)  # what a sum over steps pays for nothing new
    for aggregate in ("min", "last", "product"):
        returns = [
            sum(
                increments(
                    chances, range(len(chances)), aggregate=aggregate, num_tokens=len(chances)
                )
            )
            for chances in (short, padded)
        ]
        assert returns[1] <= returns[0] + 1e-12


def test_steps_end_at_separators_and_at_the_end():
    class Words:
        def decode(self, ids: list[int]) -> str:
            return {0: "a", 1: "b", 2: ".\n", 3: "</s>"}[ids[0]]

    words = Words()
    assert step_ends([0, 2, 1, 2, 0, 3], words, "\n") == [1, 3, 5]  # type: ignore[arg-type]
    assert step_ends([0, 2], words, "\n") == [1]  # type: ignore[arg-type]
    assert step_ends([0, 3], words, "\n") == [1]  # type: ignore[arg-type]
