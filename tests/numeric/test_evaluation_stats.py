"""Coverage, power, sequential stopping, length control and pass@k, each against its own oracle."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from align.core.types import NO_DIFFERENCE
from align.evaluation.length import length_controlled_win_rate
from align.evaluation.passk import pass_at_k, pass_by_prompt
from align.evaluation.sequential import ConfidenceSequence
from align.evaluation.stats import (
    prompts_needed,
    share_interval,
    smallest_difference,
    standard_error,
    win_rate_of,
)
from benchmarks.coverage import Case, clustered, measure, ties


@pytest.mark.parametrize(
    "case",
    [
        Case("ties", 50, ties(50, (0.3, 0.5, 0.2))),
        Case("many wins", 100, ties(100, (0.7, 0.1, 0.2))),
        Case("clusters", 60, clustered(60, 0.7, 0.3, (1, 2, 4, 8))),
    ],
    ids=lambda case: case.name,
)
def test_intervals_cover_the_truth_as_often_as_they_say(case: Case):
    # benchmarks/coverage.py does it for more cases and writes the figures down.
    assert measure(case, 2000)["coverage"] == pytest.approx(0.95, abs=0.015)


def test_answers_taken_for_independent_prompts_cover_far_less():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        chance = rng.beta(1.5, 1.5, 40)
        results = (rng.random((40, 8)) < chance[:, None]).astype(float).ravel()
        interval = share_interval(results)
        covered += interval.low <= 0.5 <= interval.high
    assert covered / 300 < 0.8


def test_prompts_needed_shows_the_difference_as_often_as_promised():
    rng = np.random.default_rng(3)
    shares, difference = (0.45, 0.2, 0.35), 0.05
    pilot = rng.choice([1.0, 0.5, 0.0], 20_000, p=shares)
    n = prompts_needed(difference, standard_error=standard_error(pilot), num_prompts=pilot.size)
    # By hand: variance of (1, 1/2, 0) with these chances is 0.5 - 0.55^2 = 0.1975, and
    # (1.96 + 0.84)^2 * 0.1975 / 0.05^2 = 620.
    assert n == pytest.approx(620, rel=0.03)
    shown = [win_rate_of(rng.choice([1.0, 0.5, 0.0], n, p=shares)).low > 0.5 for _ in range(1000)]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.04)


def test_prompts_needed_and_smallest_difference_agree():
    reach = smallest_difference(standard_error=0.02)
    assert reach == pytest.approx(0.02 * (1.959964 + 0.841621))
    assert prompts_needed(reach, standard_error=0.02, num_prompts=400) in (400, 401)
    assert prompts_needed(0.0, standard_error=0.02, num_prompts=400) is None


def test_sequence_gives_a_false_verdict_less_often_than_its_level():
    rng = np.random.default_rng(11)
    rounds, wrong, naive = 200, 0, 0
    for _ in range(rounds):
        values = rng.choice([1.0, 0.5, 0.0], 100, p=(0.4, 0.2, 0.4))
        sequence = ConfidenceSequence(0.95)
        shown = False
        for value in values:
            sequence.update(float(value))
            shown |= sequence.verdict != NO_DIFFERENCE
        wrong += shown
        looks = [win_rate_of(values[:n]) for n in range(10, 101, 10)]
        naive += any(not look.low <= 0.5 <= look.high for look in looks)
    # Binomial standard deviation at 200 rounds and 5 %: 1.5 %.
    assert wrong / rounds <= 0.05 + 0.03
    # The same looks through intervals of a fixed size: this is what the sequence is for.
    assert naive / rounds > 0.10


def test_sequence_stops_soon_where_the_difference_is_large():
    rng = np.random.default_rng(5)
    counts = []
    for _ in range(40):
        sequence = ConfidenceSequence(0.95)
        for value in rng.choice([1.0, 0.5, 0.0], 400, p=(0.7, 0.1, 0.2)):
            sequence.update(float(value))
            if sequence.verdict != NO_DIFFERENCE:
                break
        assert sequence.verdict == "better"
        assert sequence.interval.low > 0.5
        counts.append(sequence.count)
    assert np.mean(counts) < 100


def test_sequence_is_never_wider_after_another_look():
    rng = np.random.default_rng(1)
    sequence = ConfidenceSequence(0.9)
    low, high = 0.0, 1.0
    for value in rng.random(200):
        sequence.update(float(value))
        assert sequence.interval.low >= low
        assert sequence.interval.high <= high
        low, high = sequence.interval.low, sequence.interval.high
    assert low < 0.5 < high
    with pytest.raises(ValueError, match=r"1\.5"):
        sequence.update(1.5)


def test_length_control_is_the_minimum_of_the_penalized_likelihood():
    rng = np.random.default_rng(2)
    d = rng.normal(5, 30, 150)
    y = rng.choice([1.0, 0.5, 0.0], 150)
    x = np.tanh(d / d.std())

    def negative(beta: np.ndarray) -> float:
        logit = beta[0] + beta[1] * x
        return float((np.log1p(np.exp(logit)) - y * logit).sum() + beta[1] ** 2 / 2)

    best = minimize(negative, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9}).x
    found = length_controlled_win_rate(y, d)
    assert found.value == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-5)


def test_length_control_takes_out_a_win_that_is_only_longer():
    # The judge likes what is longer and nothing else; the model's answers are longer by 20.
    rng = np.random.default_rng(4)
    d = rng.normal(20, 30, 2000)
    y = (rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(d / 30)))).astype(float)
    assert y.mean() > 0.6
    found = length_controlled_win_rate(y, d)
    assert found.low < 0.5 < found.high
    # Without any difference in length it is the win rate itself.
    plain = length_controlled_win_rate(y, np.zeros(2000))
    assert plain.value == pytest.approx(y.mean(), abs=1e-6)


def test_length_control_counts_copies_of_a_prompt_once():
    rng = np.random.default_rng(6)
    d, y = rng.normal(size=60), rng.choice([1.0, 0.0], 60)
    once = length_controlled_win_rate(y, d)
    # The prior weighs less against five copies, so the bounds are close and not the same.
    many = length_controlled_win_rate(np.tile(y, 5), np.tile(d, 5), clusters=np.tile(range(60), 5))
    assert many.high - many.low == pytest.approx(once.high - once.low, rel=0.1)


@pytest.mark.parametrize(
    ("y", "d"), [([1.0] * 5, range(5)), ([0.0] * 5, range(5)), ([1, 0], [1, 2])]
)
def test_length_control_says_where_nothing_can_be_said(y: list[float], d: list[float]):
    assert length_controlled_win_rate(y, d) is None


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 3), (6, 1, 1), (4, 4, 2), (7, 0, 3), (5, 3, 5)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(n: int, c: int, k: int):
    choices = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_unbiased():
    # With chance p an answer is right: one of 3 is with chance 1 - (1 - p)^3. The mean over all
    # outcomes of 6 answers, weighted by their binomial chance, is exactly that.
    from math import comb

    p = 0.3
    mean = sum(comb(6, c) * p**c * (1 - p) ** (6 - c) * pass_at_k(6, c, 3) for c in range(7))
    assert mean == pytest.approx(1 - 0.7**3)


def test_pass_at_k_leaves_out_prompts_with_too_few_valid_answers():
    scores = [1.0, 0.0, 0.0, 0.0, None, 1.0]
    prompts = ["a", "a", "b", "b", "c", "c"]
    # c has one valid answer only
    assert pass_by_prompt(scores, prompts, k=2) == {"a": 1.0, "b": 0.0}
    assert pass_by_prompt([None], ["a"], k=1) == {}
