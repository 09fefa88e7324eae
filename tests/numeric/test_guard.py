"""The guard's maths against scipy and hand numbers, and its alarms on histories made on purpose."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import curve_fit

from align.online.guard import (
    Evaluation,
    alarms,
    best_step,
    by_prompt,
    fit_curve,
    gains_of,
    over_prompts,
    repeated_share,
    slope,
    stopping_alarm,
)

NUM_PROMPTS = 40


def history_of(
    gold: list[float],
    proxy: list[float] | None = None,
    *,
    noise: float = 0.05,
    seed: int = 0,
    **changed: list,
) -> list[Evaluation]:
    """Make evaluations every 5 steps with these means, and prompts that scatter around them."""
    rng = np.random.default_rng(seed)
    level = rng.normal(0.0, 0.3, NUM_PROMPTS)

    def scattered(mean: float) -> list[float]:
        return (mean + level + rng.normal(0.0, noise, NUM_PROMPTS)).tolist()

    found = []
    for i, value in enumerate(gold):
        fields = {name: values[i] for name, values in changed.items()}
        found.append(
            Evaluation(
                **{
                    "step": 5 * i,
                    "kl": 0.5 * i,
                    "gold": scattered(value),
                    "proxy": scattered(proxy[i] if proxy else 0.0),
                    "length": [10.0 + 0.01 * p for p in range(NUM_PROMPTS)],
                    "repetition": [0.0] * NUM_PROMPTS,
                    "rewards": {"a": 0.0},
                    "disagreement": None,
                    **fields,
                }
            )
        )
    return found


def names(history: list[Evaluation], window: int = 4) -> list[str]:
    return [alarm.name for alarm in alarms(history, window=window)]


def test_fit_finds_the_curve_that_scipy_finds() -> None:
    rng = np.random.default_rng(1)
    kl = np.array([0.3, 1.0, 2.5, 4.0, 7.0, 12.0])
    d = np.sqrt(kl)
    gains = (d * (1.3 - 0.6 * np.log(d)))[:, None] + rng.normal(0, 0.2, (6, 30))
    fit = fit_curve([0.0, *kl], np.vstack([np.zeros((1, 30)), gains]))
    assert fit is not None
    (alpha, beta), _ = curve_fit(lambda x, a, b: x * (a - b * np.log(x)), d, gains.mean(axis=1))
    assert fit.alpha.value == pytest.approx(alpha, rel=1e-6)
    assert fit.beta.value == pytest.approx(beta, rel=1e-6)
    # The top by search on a fine grid instead of by the derivative.
    grid = np.linspace(0.5, 30.0, 200_001)
    top = grid[np.argmax(grid * (alpha - beta * np.log(grid)))]
    assert fit.top_kl == pytest.approx(top**2, rel=1e-3)


def test_fit_intervals_hold_the_true_parameters_in_95_of_100() -> None:
    d = np.sqrt(np.array([0.5, 1.0, 2.0, 4.0, 8.0]))
    rng = np.random.default_rng(2)
    draws = 1000
    held = np.zeros(2)
    for _ in range(draws):
        # Prompts differ in both parameters; their means are 1 and 0.4.
        a = rng.normal(1.0, 0.5, 60)
        b = rng.normal(0.4, 0.3, 60)
        gains = d[:, None] * (a - b * np.log(d)[:, None]) + rng.normal(0, 0.3, (5, 60))
        fit = fit_curve((d**2).tolist(), gains)
        assert fit is not None
        held += [fit.alpha.low <= 1.0 <= fit.alpha.high, fit.beta.low <= 0.4 <= fit.beta.high]
    assert (np.abs(held / draws - 0.95) < 0.02).all(), held


def test_fit_says_nothing_of_a_top_where_the_curve_only_rises() -> None:
    d = np.sqrt(np.array([1.0, 2.0, 4.0]))
    rising = np.tile((d * (0.5 + 0.2 * np.log(d)))[:, None], (1, 5))
    fit = fit_curve((d**2).tolist(), rising)
    assert fit is not None
    assert fit.top_kl is None
    assert fit_curve([1.0, 2.0, 0.0], np.zeros((3, 5))) is None


def test_slope_is_the_mean_of_the_prompts_own_regressions() -> None:
    rng = np.random.default_rng(3)
    values, steps = rng.normal(size=(5, 12)), [0.0, 5.0, 10.0, 20.0, 25.0]
    own = [stats.linregress(steps, values[:, p]).slope for p in range(12)]
    found = slope(values, steps)
    assert found.value == pytest.approx(np.mean(own))
    half = stats.t.ppf(0.975, 11) * stats.sem(own)
    assert found.high - found.low == pytest.approx(2 * half)


def test_the_slope_of_gold_is_per_step_also_between_uneven_steps() -> None:
    """Gold falls by exactly 0.01 a step: 1 per 100 steps, and by 0.33 from one look to the next."""
    steps = [0, 10, 20, 100]
    history = history_of([-0.01 * step for step in steps], noise=0.001, step=steps)
    (alarm,) = [a for a in alarms(history, window=4) if a.name == "gold_slope"]
    assert "falls by 1 per 100 steps since step 0" in alarm.reason
    # The line through one prompt, by scipy.
    (gold,) = by_prompt(history, "gold")
    own = stats.linregress(steps, gold.mean(axis=1)).slope
    assert own == pytest.approx(-0.01, rel=0.02)


def test_over_prompts_by_hand() -> None:
    # mean 2, sample variance 1, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.302653
    found, half = over_prompts(np.array([1.0, 2.0, 3.0])), 4.302653 / math.sqrt(3)
    assert found == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-6)
    assert math.isnan(over_prompts(np.array([1.0])).low)


@pytest.mark.parametrize("num_prompts", [3, 8])
def test_intervals_over_few_prompts_cover_the_mean_in_95_of_100(num_prompts: int) -> None:
    """With the normal quantile they were too narrow: 0.91 at 8 prompts, 0.81 at 3."""
    rng = np.random.default_rng(0)
    found = [over_prompts(rng.normal(0.5, 1.0, num_prompts)) for _ in range(2000)]
    covered = sum(interval.low <= 0.5 <= interval.high for interval in found) / 2000
    assert 0.935 <= covered <= 0.965


def test_invalid_scores_take_their_prompt_out_of_every_evaluation() -> None:
    history = history_of([0.0, 1.0])
    history[1].gold[3] = None
    gold, proxy = by_prompt(history, "gold", "proxy")
    assert gold.shape == proxy.shape == (2, NUM_PROMPTS - 1)
    assert gold[0, 3] == history[0].gold[4]
    assert gains_of(history, "gold")[0].tolist() == [0.0] * (NUM_PROMPTS - 1)


def test_repeated_share_counts_trigrams_that_occurred_before() -> None:
    # "a b a b a": aba bab aba, one of three a repeat.
    assert repeated_share("a b a b a") == pytest.approx(1 / 3)
    assert repeated_share("a b") == 0.0


def test_best_step_is_the_first_of_the_highest_and_never_an_invalid_one() -> None:
    history = history_of([0.2, 0.9, 0.5], noise=0.0)
    assert best_step(history) == 5
    history.append(dataclasses.replace(history[1], step=15))
    assert best_step(history) == 5
    history.append(dataclasses.replace(history[0], step=20, gold=[None] * NUM_PROMPTS))
    assert best_step(history) == 5


def test_best_step_compares_the_same_prompts() -> None:
    """The second evaluation is worse on both prompts that it scores, the third better on three."""
    first, *others = history_of([0.0] * 4, noise=0.0)
    scores = [[0.9, 0.9, None, None], [1.0, 1.0, 0.1, None], [None] * 4]
    history = [dataclasses.replace(first, gold=[1.0, 1.0, 0.0, 0.0])]
    history += [dataclasses.replace(e, gold=g) for e, g in zip(others, scores, strict=True)]
    assert [best_step(history[:n]) for n in range(1, 5)] == [0, 0, 10, 10]
    # An evaluation without any score is replaced by the first one that has some.
    assert best_step([history[3], history[1]]) == 5


def test_gold_alarm_rings_after_the_turn_and_not_before() -> None:
    gold = [0.0, 0.3, 0.6, 0.8, 0.9, 0.85, 0.75, 0.6, 0.45]
    rung = [i for i in range(1, 10) if "gold_slope" in names(history_of(gold)[:i])]
    assert rung[0] in (7, 8)  # the top is the 5th
    assert rung[-1] == 9
    alarm = alarms(history_of(gold), window=4)[0]
    assert "step 20" in alarm.remedy
    assert "per 100 steps" in alarm.reason


def test_gold_alarm_seldom_rings_on_a_score_that_stays() -> None:
    # One-sided 2.5 % an evaluation: of 400 flat histories 10 +- 3.1 at their newest.
    rung = sum("gold_slope" in names(history_of([0.5] * 4, seed=s, noise=0.2)) for s in range(400))
    assert rung <= 20


def test_gap_alarm_needs_a_rising_proxy_and_a_gold_that_does_not() -> None:
    flat, rising = [0.5] * 5, [0.0, 0.2, 0.4, 0.6, 0.8]
    assert "proxy_gap" in names(history_of(flat, rising))
    assert "proxy_gap" not in names(history_of(rising, rising))
    assert "proxy_gap" not in names(history_of(flat, flat))


def test_gap_is_counted_in_each_scores_own_units() -> None:
    flat, rising = [0.5] * 5, [0.0, 0.2, 0.4, 0.6, 0.8]
    plain = history_of(flat, rising)
    scaled = [
        dataclasses.replace(e, proxy=[1000.0 * x for x in e.proxy if x is not None]) for e in plain
    ]
    assert alarms(plain, window=4) == alarms(scaled, window=4)


def test_length_alarm_is_quiet_while_gold_rises() -> None:
    longer = [[10.0 + 2 * i + 0.1 * p for p in range(NUM_PROMPTS)] for i in range(5)]
    assert "length" in names(history_of([0.5] * 5, length=longer))
    assert "length" not in names(history_of([0.1, 0.3, 0.5, 0.7, 0.9], length=longer))


def test_repetition_one_reward_and_disagreement_alarms() -> None:
    gold = [0.5] * 4
    repeating = [[0.05 * i + 0.001 * p for p in range(NUM_PROMPTS)] for i in range(4)]
    assert "repetition" in names(history_of(gold, repetition=repeating))
    lone = [{"a": 0.5 * i, "b": 0.01 * i} for i in range(4)]
    even = [{"a": 0.5 * i, "b": 0.4 * i} for i in range(4)]
    assert "one_reward" in names(history_of(gold, rewards=lone))
    assert "one_reward" not in names(history_of(gold, rewards=even))
    assert "disagreement" in names(history_of(gold, disagreement=[0.2, 0.3, 0.4, 0.5]))
    assert "disagreement" not in names(history_of(gold, disagreement=[0.2, 0.3, 0.4, 0.3]))


def test_no_alarm_before_the_window_is_full() -> None:
    assert names(history_of([0.9, 0.5, 0.1])) == []


def test_stopping_needs_the_same_alarm_several_times_in_a_row() -> None:
    falling = history_of([0.9, 0.9, 0.9, 0.6, 0.3])
    rules = {"stop_on": ["gold_slope"], "window": 4}
    assert stopping_alarm(falling[:4], patience=1, **rules) is not None
    assert stopping_alarm(falling[:4], patience=2, **rules) is None
    found = stopping_alarm(falling, patience=2, **rules)
    assert found is not None
    assert found.name == "gold_slope"
    assert stopping_alarm(falling, patience=2, window=4, stop_on=[]) is None
    assert stopping_alarm(falling, patience=2, window=4, stop_on=["length"]) is None
