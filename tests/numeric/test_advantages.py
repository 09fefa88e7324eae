"""Advantage estimators against hand numbers, slow definitions and invariances."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.online.advantages import (
    dead_groups,
    gae,
    group_relative,
    leave_one_out,
    shaped_rewards,
)

NAN = float("nan")
numbers = st.floats(-5, 5)
tokens = st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=10)
scored = st.lists(
    st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.5, 1.0, 2.0])), min_size=1, max_size=12
)


def rows(row):
    """Give rewards, values and mask of one row; values under the mask are NaN, rewards 0."""
    rewards = torch.tensor([[r if keep else 0.0 for r, _, keep in row]], dtype=torch.float64)
    values = torch.tensor([[v if keep else NAN for _, v, keep in row]], dtype=torch.float64)
    return rewards, values, torch.tensor([[keep for _, _, keep in row]])


def gae_by_definition(row, gamma, lam):
    """Give A_i = sum_k (gamma lam)^k delta_(i+k) over the trained tokens alone."""
    steps = [(r, v) for r, v, keep in row if keep]
    if not steps:
        return []
    following = [v for _, v in steps[1:]] + [0.0]
    deltas = [r + gamma * n - v for (r, v), n in zip(steps, following, strict=True)]
    return [
        math.fsum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
        for i in range(len(deltas))
    ]


# Trained tokens at 1, 4 and 5 with rewards 1, 0, 2 and values 1, 2, 4; gamma = lam = 1/2.
#   t=5: delta = 2 + 0   - 4 = -2   A = -2                  R = 2
#   t=4: delta = 0 + 4/2 - 2 =  0   A = 0 + (-2) / 4        R = -0.5 + 2
#   t=1: delta = 1 + 2/2 - 1 =  1   A = 1 + (-0.5) / 4      R = 0.875 + 1
GAP = [
    (9, 9, False),
    (1, 1, True),
    (9, 9, False),
    (9, 9, False),
    (0, 2, True),
    (2, 4, True),
    (9, 9, False),
]


def test_gae_with_gaps_by_hand():
    advantages, returns = gae(*rows(GAP), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.0, 0.875, 0.0, 0.0, -0.5, -2.0, 0.0]]
    assert returns.tolist() == [[0.0, 1.875, 0.0, 0.0, 1.5, 2.0, 0.0]]


def test_gae_bootstraps_a_cut_answer_by_hand():
    # As above with value 8 behind the end: t=5 delta = 2 + 8/2 - 4 = 2; t=4 A = 0 + 2/4; t=1
    # A = 1 + 0.5/4.
    bootstrap = torch.tensor([8.0], dtype=torch.float64)
    advantages, _ = gae(*rows(GAP), gamma=0.5, lam=0.5, bootstrap=bootstrap)
    assert advantages[0, [1, 4, 5]].tolist() == [1.125, 0.5, 2.0]


def test_gae_steps_over_tool_output_instead_of_through_it():
    # 5 trained tokens, 50 of a tool, 5 trained; V = 0.5, reward 1 at the end, lam = 0.95. Only the
    # last delta is not 0: it is 0.5, and the last token before the tool is 5 trained steps away.
    mask = torch.tensor([[True] * 5 + [False] * 50 + [True] * 5])
    values = torch.full((1, 60), 0.5)
    rewards = torch.zeros(1, 60)
    rewards[0, -1] = 1.0
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert advantages[0, 4].item() == pytest.approx(0.5 * 0.95**5)
    assert advantages[0, 4].item() == pytest.approx(0.387, abs=5e-4)
    # Walking through the tool's tokens with values set to 0 instead flips the sign: -0.432.
    everywhere = torch.ones_like(mask)
    walked, _ = gae(rewards, values * mask, everywhere, gamma=1.0, lam=0.95)
    assert walked[0, 4].item() == pytest.approx(-0.432, abs=5e-4)


@given(tokens, st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_definition(row, gamma, lam):
    rewards, values, mask = rows(row)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = gae_by_definition(row, gamma, lam)
    assert advantages[mask].tolist() == pytest.approx(expected, abs=1e-9)
    kept = [a + v for a, (_, v, _) in zip(expected, [t for t in row if t[2]], strict=True)]
    assert returns[mask].tolist() == pytest.approx(kept, abs=1e-9)
    assert (advantages[~mask] == 0.0).all()
    assert (returns[~mask] == 0.0).all()


@given(tokens, st.floats(0, 1))
def test_gae_with_lambda_one_telescopes_to_the_discounted_return(row, gamma):
    rewards, values, mask = rows(row)
    _, returns = gae(rewards, values, mask, gamma=gamma, lam=1.0)
    kept = [r for r, _, keep in row if keep]
    expected = [math.fsum(gamma**k * r for k, r in enumerate(kept[i:])) for i in range(len(kept))]
    assert returns[mask].tolist() == pytest.approx(expected, abs=1e-9)


@given(tokens, tokens, st.integers(0, 4))
def test_gae_does_not_depend_on_padding_side_or_batch_mates(row, mate, pad):
    blank = (0.0, 0.0, False)
    width = max(len(row), len(mate)) + pad
    left = [blank] * (width - len(row)) + row
    right = mate + [blank] * (width - len(mate))
    batch = [torch.cat(pair) for pair in zip(rows(left), rows(right), strict=True)]
    together, _ = gae(*batch, gamma=0.9, lam=0.8)
    for i, original in enumerate((row, mate)):
        alone, _ = gae(*rows(original), gamma=0.9, lam=0.8)
        kept, mask = rows(original)[2], batch[2][i]
        torch.testing.assert_close(together[i][mask], alone[kept])


def test_gae_refuses_a_reward_that_it_would_lose():
    rewards, values, mask = torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[True, False]])
    with pytest.raises(AssertionError, match="masked token"):
        gae(rewards, values, mask, gamma=1.0, lam=1.0)


def test_shaped_rewards_by_hand_and_nothing_of_the_score_is_lost():
    kl = torch.tensor([[NAN, 1.0, 2.0, NAN], [3.0, NAN, 4.0, 5.0], [NAN] * 4])
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    shaped = shaped_rewards(torch.tensor([10.0, -1.0, 7.0]), kl, mask, kl_coef=0.1)
    expected = [[0.0, -0.1, 9.8, 0.0], [-0.3, 0.0, -0.4, -1.5], [0.0] * 4]
    for got, row in zip(shaped.tolist(), expected, strict=True):
        assert got == pytest.approx(row)


@given(scored, st.randoms(use_true_random=False))
def test_group_relative_equals_the_definition_in_any_order(answers, random):
    order = random.sample(answers, len(answers))
    ids = torch.tensor([g for g, _ in order])
    scores = torch.tensor([s for _, s in order], dtype=torch.float64)
    plain = group_relative(scores, ids, scale="none").tolist()
    scaled = group_relative(scores, ids, scale="std").tolist()
    others = leave_one_out(scores, ids).tolist()
    for i, (group, score) in enumerate(order):
        peers = [s for g, s in order if g == group]
        if len(set(peers)) == 1:
            assert plain[i] == scaled[i] == others[i] == 0.0
            continue
        distance = score - statistics.fmean(peers)
        rest = (math.fsum(peers) - score) / (len(peers) - 1)
        assert plain[i] == pytest.approx(distance, abs=1e-9)
        assert scaled[i] == pytest.approx(distance / (statistics.stdev(peers) + 1e-4), abs=1e-9)
        assert others[i] == pytest.approx(score - rest, abs=1e-9)
        # RLOO is G / (G - 1) times the centered score.
        size = len(peers)
        assert others[i] == pytest.approx(size / (size - 1) * plain[i], abs=1e-9)


def test_group_relative_by_hand():
    # Group 7: scores 0, 3, 6, mean 3, sample deviation sqrt(18 / 2) = 3. Group 2: 1 and 0.
    ids, scores = torch.tensor([7, 2, 7, 7, 2]), torch.tensor([0.0, 1.0, 3.0, 6.0, 0.0])
    assert group_relative(scores, ids, scale="none").tolist() == [-3.0, 0.5, 0.0, 3.0, -0.5]
    third, half = 3 / 3.0001, 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = [-third, half, 0.0, third, -half]
    assert group_relative(scores, ids, scale="std").tolist() == pytest.approx(expected)
    # 0 against (3 + 6) / 2, 3 against (0 + 6) / 2, 6 against (0 + 3) / 2; 1 against 0.
    assert leave_one_out(scores, ids).tolist() == pytest.approx([-4.5, 1.0, 0.0, 4.5, -1.0])


def test_dead_groups_get_exactly_zero_and_rounding_is_not_blown_up():
    # 0.95 is no binary fraction: the mean of seven is not 0.95 in float32.
    equal, single = torch.full((7,), 0.95), torch.tensor([123.0])
    scores = torch.cat([equal, single])
    ids = torch.tensor([0] * 7 + [1])
    assert dead_groups(scores, ids).tolist() == [True] * 8
    for scale in ("std", "none"):
        assert group_relative(scores, ids, scale=scale).tolist() == [0.0] * 8
    assert leave_one_out(scores, ids).tolist() == [0.0] * 8
    nearly = equal.clone()
    nearly[0] = torch.nextafter(nearly[0], torch.tensor(2.0))
    assert not dead_groups(nearly, ids[:7]).any()
    assert group_relative(nearly, ids[:7], scale="std").abs().max().item() < 1e-3


@given(scored, st.integers(-8, 8))
def test_group_advantages_do_not_depend_on_an_offset_or_the_group_numbers(answers, offset):
    ids = torch.tensor([g for g, _ in answers])
    scores = torch.tensor([s for _, s in answers], dtype=torch.float64)
    base = group_relative(scores, ids, scale="std")
    torch.testing.assert_close(group_relative(scores + offset, ids, scale="std"), base)
    assert torch.equal(group_relative(scores, 1000 - 7 * ids, scale="std"), base)


def test_group_relative_refuses_scores_that_are_no_numbers():
    with pytest.raises(AssertionError, match="finite"):
        group_relative(torch.tensor([1.0, NAN]), torch.tensor([0, 0]), scale="std")
