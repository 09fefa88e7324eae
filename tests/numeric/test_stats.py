"""Bootstrap intervals and win rates: hand counts, coverage by simulation, symmetries."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.evaluation import stats
from align.evaluation.stats import paired_bootstrap, win_rate


def test_win_rate_with_ties_by_hand():
    # Wins: 3 > 1, 5 > 4; ties: 2 = 2, 0 = 0; loss: 1 < 6. (2 + 2 / 2) / 5.
    rate = win_rate([3, 2, 5, 0, 1], [1, 2, 4, 0, 6])
    assert (rate.wins, rate.ties, rate.losses) == (2, 2, 1)
    assert rate.value == pytest.approx(0.6)
    assert 0.0 <= rate.low < 0.6 < rate.high <= 1.0


def test_win_rate_of_ties_alone_is_one_half():
    rate = win_rate([1.0] * 50, [1.0] * 50)
    assert (rate.value, rate.ties) == (0.5, 50)
    assert rate.low < 0.5 < rate.high


def test_win_rate_without_spread_has_wilson_bounds():
    # All of n won: Wilson's lower bound is n / (n + z^2) = 10 / (10 + 3.8415), the upper is 1.
    rate = win_rate([1.0] * 10, [0.0] * 10)
    assert rate.value == 1.0
    assert rate.low == pytest.approx(10 / 13.8415, abs=1e-4)
    assert rate.high == pytest.approx(1.0)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=20),
    st.integers(0, 5),
)
def test_win_rate_of_the_other_side_is_the_mirror(pairs, seed):
    a, b = ([float(x) for x in side] for side in zip(*pairs, strict=True))
    ours = win_rate(a, b, num_draws=200, seed=seed)
    theirs = win_rate(b, a, num_draws=200, seed=seed)
    assert (ours.wins, ours.ties, ours.losses) == (theirs.losses, theirs.ties, theirs.wins)
    assert ours.value == pytest.approx(1.0 - theirs.value)
    assert ours.low == pytest.approx(1.0 - theirs.high)
    assert ours.high == pytest.approx(1.0 - theirs.low)


def test_bootstrap_value_weighs_answers_not_clusters():
    # Cluster x has three answers: (1 + 2 + 3 + 10) / 4, not the mean of 2 and 10.
    interval = paired_bootstrap([1, 2, 3, 10], clusters=["x", "x", "x", "y"])
    assert interval.value == 4.0
    # Two clusters give the resamples xx, xy, yy: means 2, 4, 10, with chances 1/4, 1/2, 1/4.
    assert (interval.low, interval.high) == (2.0, 10.0)
    middle = paired_bootstrap([1, 2, 3, 10], clusters=["x", "x", "x", "y"], level=0.2)
    assert (middle.low, middle.high) == (4.0, 4.0)


def test_bootstrap_interval_has_the_width_of_the_normal_theory():
    x = np.random.default_rng(0).normal(size=400)
    interval = paired_bootstrap(x, num_draws=4000)
    half = 1.96 * x.std() / math.sqrt(400)
    assert interval.value == pytest.approx(x.mean())
    assert interval.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says_only_with_clusters():
    # 40 prompts, 4 answers each; an answer is its prompt's difficulty plus noise. The percentile
    # interval of 40 clusters covers about 94 %; taken as 160 independent answers, far less.
    rng = np.random.default_rng(7)
    prompts = np.repeat(np.arange(40), 4)
    rounds, clustered, naive = 300, 0, 0
    for seed in range(rounds):
        x = rng.normal(size=40)[prompts] + 0.5 * rng.normal(size=160)
        with_clusters = paired_bootstrap(x, clusters=prompts.tolist(), num_draws=300, seed=seed)
        without = paired_bootstrap(x, num_draws=300, seed=seed)
        clustered += with_clusters.low <= 0.0 <= with_clusters.high
        naive += without.low <= 0.0 <= without.high
    # Binomial standard deviation at 300 rounds: 1.4 %.
    assert 0.89 <= clustered / rounds <= 0.98
    assert naive / rounds < 0.8


def test_bootstrap_difference_is_paired():
    rng = np.random.default_rng(1)
    difficulty = 10.0 * rng.normal(size=100)
    a = difficulty + 0.1 + 0.05 * rng.normal(size=100)
    interval = paired_bootstrap(a, difficulty)
    assert 0.08 < interval.low < interval.high < 0.12


def test_bootstrap_is_a_function_of_its_seed_alone(monkeypatch):
    x = np.random.default_rng(2).normal(size=30)
    first = paired_bootstrap(x, seed=3)
    assert paired_bootstrap(x, seed=3) == first
    assert paired_bootstrap(x, seed=4) != first
    # Neither the memory at hand nor the names of the clusters may show.
    monkeypatch.setattr(stats, "DRAW_CELLS", 97)
    assert paired_bootstrap(x, seed=3) == first
    assert paired_bootstrap(x, seed=3, clusters=[f"p{i}" for i in range(30)]) == first


def test_bootstrap_of_a_wider_level_is_wider():
    x = np.random.default_rng(2).normal(size=30)
    narrow, wide = (paired_bootstrap(x, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_bootstrap_of_one_cluster_gives_no_bounds():
    interval = paired_bootstrap([1.0, 2.0], clusters=["x", "x"])
    assert interval.value == 1.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize(
    ("a", "b", "clusters", "message"),
    [
        ([], None, None, "non-empty"),
        ([1.0, float("nan")], None, None, r"a\[1\] is nan"),
        ([1.0, 2.0], [1.0], None, "2 scores against 1"),
        ([1.0, 2.0], None, ["x"], "1 cluster names for 2"),
    ],
)
def test_bootstrap_refuses_scores_it_cannot_pair(a, b, clusters, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, clusters=clusters)
