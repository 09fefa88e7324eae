"""Bootstrap intervals and win rates: hand counts, coverage by simulation, symmetries."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.evaluation import stats
from align.evaluation.stats import (
    paired_bootstrap,
    ratio_bootstrap,
    share_interval,
    standard_error,
    win_rate,
)


def test_win_rate_with_ties_by_hand():
    # Wins: 3 > 1, 5 > 4; ties: 2 = 2, 0 = 0; loss: 1 < 6. (2 + 2 / 2) / 5.
    rate = win_rate([3, 2, 5, 0, 1], [1, 2, 4, 0, 6])
    assert (rate.wins, rate.ties, rate.losses) == (2, 2, 1)
    assert rate.value == pytest.approx(0.6)
    assert 0.0 <= rate.low < 0.6 < rate.high <= 1.0


def test_win_rate_of_ties_alone_is_one_half():
    rate = win_rate([1.0] * 50, [1.0] * 50)
    assert (rate.value, rate.ties) == (0.5, 50)
    # At most 3.8415 / (50 + 3.8415) = 7.13 % of other prompts are no ties: all lost or all won.
    assert (rate.low, rate.high) == pytest.approx((0.5 - 0.0713 / 2, 0.5 + 0.0713 / 2), abs=1e-4)


def test_win_rate_without_spread_has_wilson_bounds():
    # All of n won: Wilson's lower bound is n / (n + z^2) = 10 / (10 + 3.8415), the upper is 1.
    rate = win_rate([1.0] * 10, [0.0] * 10)
    assert rate.value == 1.0
    assert rate.low == pytest.approx(10 / 13.8415, abs=1e-4)
    assert rate.high == pytest.approx(1.0)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=20),
)
def test_win_rate_of_the_other_side_is_the_mirror(pairs):
    a, b = ([float(x) for x in side] for side in zip(*pairs, strict=True))
    ours = win_rate(a, b)
    theirs = win_rate(b, a)
    assert (ours.wins, ours.ties, ours.losses) == (theirs.losses, theirs.ties, theirs.wins)
    assert ours.value == pytest.approx(1.0 - theirs.value)
    assert ours.low == pytest.approx(1.0 - theirs.high)
    assert ours.high == pytest.approx(1.0 - theirs.low)


def test_bootstrap_value_weighs_answers_not_clusters():
    # Cluster x has three answers: (1 + 2 + 3 + 10) / 4, not the mean of 2 and 10.
    interval = paired_bootstrap([1, 2, 3, 10], clusters=["x", "x", "x", "y"])
    assert interval.value == 4.0
    # Half of the resamples of two clusters have no spread, so the interval is Student's with one
    # degree of freedom (12.7062). Residuals 6 - 3 * 4 and 10 - 4: the error is
    # sqrt(2 / (2 - 1) * (36 + 36)) / 4 = 3.
    assert interval.low == pytest.approx(4.0 - 3 * 12.7062, abs=1e-3)
    assert interval.high == pytest.approx(4.0 + 3 * 12.7062, abs=1e-3)


def test_bootstrap_of_clusters_that_are_all_alike_is_the_value():
    interval = paired_bootstrap([2.0, 4.0, 3.0, 3.0], clusters=["x", "x", "y", "z"])
    assert (interval.value, interval.low, interval.high) == (3.0, 3.0, 3.0)


def test_share_of_independent_trials_is_wilsons_with_students_quantile():
    # 12 right of 40. The jackknife's variance is p (1 - p) / (n - 1), so there are n - 1 trials.
    p, trials, z = 0.3, 39, 2.022691  # t quantile, 39 degrees of freedom
    middle = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    interval = share_interval([1.0] * 12 + [0.0] * 28)
    assert (interval.low, interval.high) == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_share_of_copies_knows_no_more_than_one_of_each():
    x = [1.0, 0.0, 1.0, 1.0, 0.5, 0.0]
    copies = share_interval(x * 7, clusters=list(range(6)) * 7)
    assert copies.low == pytest.approx(share_interval(x).low)
    assert copies.low != pytest.approx(share_interval(x * 7).low)


def test_difference_is_a_share_on_a_wider_scale():
    results = [1.0, 0.5, 0.0, 1.0, 1.0, 0.5]
    share = share_interval(results)
    difference = share_interval([2 * x - 1 for x in results], bounds=(-1.0, 1.0))
    assert difference.value == pytest.approx(2 * share.value - 1)
    assert difference.low == pytest.approx(2 * share.low - 1)
    assert difference.high == pytest.approx(2 * share.high - 1)


def test_difference_without_a_difference_is_no_wider_than_with_one():
    none, one = (share_interval([*x, *[0.0] * 59], bounds=(-1.0, 1.0)) for x in ([0.0], [1.0]))
    assert (none.low, none.high) == pytest.approx((-0.0602, 0.0602), abs=1e-4)
    assert none.high < 2 * (one.high - one.low)


def test_share_refuses_what_is_outside_its_bounds():
    with pytest.raises(ValueError, match=r"\[0.5, 1.5\], expected \[0.0, 1.0\]"):
        share_interval([0.5, 1.5])


def test_ratio_of_unlike_clusters_is_total_over_total():
    # 10 nats on 2 tokens and 10 on 8: 2 nats a token, not the mean of 5 and 1.25.
    assert ratio_bootstrap([10.0, 10.0], [2.0, 8.0]).value == 2.0


def test_standard_error_of_independent_scores_is_the_textbooks():
    x = np.random.default_rng(5).normal(size=30)
    assert standard_error(x) == pytest.approx(x.std(ddof=1) / math.sqrt(30))
    assert math.isnan(standard_error([1.0, 2.0], clusters=["x", "x"]))


def test_bootstrap_interval_has_the_width_of_the_normal_theory():
    x = np.random.default_rng(0).normal(size=400)
    interval = paired_bootstrap(x, num_draws=4000)
    half = 1.96 * x.std() / math.sqrt(400)
    assert interval.value == pytest.approx(x.mean())
    assert interval.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.1 * half)


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


def test_share_without_a_success_lies_in_its_own_interval():
    # (z^2 / 2n - z^2 / 2n) / (1 + z^2 / n) is 0, but rounds to 7e-18 for some n.
    for n in range(2, 200):
        for x in ([0.0] * n, [1.0] * n):
            found = stats.share_interval(x)
            assert found.low <= found.value <= found.high
