"""The reward-model card: every number by hand or by a slow definition."""

import itertools
import math

import numpy as np
import pytest

from align.evaluation.card import (
    Resampler,
    ScoredPair,
    ScoredSet,
    agreement,
    best_of_n,
    calibration,
    pair_card,
    set_card,
)


def pair(
    chosen: float,
    rejected: float,
    *,
    tokens: tuple[int, int] = (10, 10),
    source: str = "a",
    prompt: str = "",
    refuses: str = "neither",
) -> ScoredPair:
    name = prompt or f"{chosen}/{rejected}/{tokens}"
    return ScoredPair(source, name, chosen, rejected, *tokens, refuses)


PAIRS = [
    pair(1.0, 0.0, tokens=(20, 10), source="a"),
    pair(2.0, 0.0, tokens=(22, 10), source="a", refuses="rejected"),
    pair(0.0, 1.0, tokens=(10, 20), source="b", refuses="chosen"),
    pair(3.0, 3.0, tokens=(10, 30), source="b"),
    pair(0.5, 0.0, tokens=(10, 11), source="b"),
]


def test_accuracies_by_hand():
    card = pair_card(PAIRS, seed=0)
    # right, right, wrong, equal (half), right: 3.5 of 5
    assert card["pair_accuracy"][0] == pytest.approx(0.7)
    assert card["by_source"]["a"]["accuracy"][0] == 1.0
    assert card["by_source"]["b"] == {
        "accuracy": card["by_source"]["b"]["accuracy"],
        "num_pairs": 3,
    }
    assert card["by_source"]["b"]["accuracy"][0] == pytest.approx(0.5)
    # 10 against 11 tokens differ by 1/11 of the longer: about equal
    assert {k: v["num_pairs"] for k, v in card["by_length"].items()} == {
        "chosen longer": 2,
        "chosen shorter": 2,
        "about equal": 1,
    }
    # longer: 1.0; shorter: (0 + 0.5) / 2 = 0.25; their mean
    assert card["length_balanced_accuracy"][0] == pytest.approx(0.625)
    assert card["by_refusal"]["chosen"]["accuracy"][0] == 0.0
    assert card["by_refusal"]["rejected"]["accuracy"][0] == 1.0


def test_log_loss_and_calibration_error_by_hand():
    # differences 1, 2, -1, 0, 0.5
    losses = [math.log1p(math.exp(-d)) for d in (1.0, 2.0, -1.0, 0.0, 0.5)]
    card = pair_card(PAIRS, seed=0)
    assert card["log_loss"][0] == pytest.approx(sum(losses) / 5)

    # Confidences .731 .881 .731 .5 .622 in bins of width .1: [.5, .6) equal -> |.5 - .5| = 0;
    # [.6, .7) |.622 - 1|; [.7, .8) one right, one wrong: 2 |.731 - .5|; [.8, .9) |.881 - 1|.
    def sure(x: float) -> float:
        return 1.0 / (1.0 + math.exp(-x))

    expected = ((1 - sure(0.5)) + 2 * (sure(1.0) - 0.5) + (1 - sure(2.0))) / 5
    assert card["ece"][0] == pytest.approx(expected)
    assert [p["num_pairs"] for p in card["calibration"]] == [1, 1, 2, 1]
    assert card["calibration"][2]["accuracy"][0] == 0.5
    assert card["calibration"][2]["confidence"] == pytest.approx(sure(1.0))


def test_a_model_that_draws_its_labels_from_its_own_probabilities_is_calibrated():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0.0, 2.0, size=4000)
    wins = rng.random(4000) < 1.0 / (1.0 + np.exp(-gaps))
    differences = np.where(wins, np.abs(gaps) * np.sign(gaps), -gaps)
    honest = pair_card([pair(d, 0.0, prompt=str(i)) for i, d in enumerate(differences)], seed=0)
    boastful = pair_card(
        [pair(5 * d, 0.0, prompt=str(i)) for i, d in enumerate(differences)], seed=0
    )
    assert honest["ece"][0] < 0.02 < 0.1 < boastful["ece"][0]
    assert honest["log_loss"][0] < boastful["log_loss"][0]
    assert honest["pair_accuracy"] == boastful["pair_accuracy"]


def test_length_correlation_is_one_for_a_model_that_counts_tokens():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 100, size=(60, 2))
    longer = [
        pair(float(c), float(r), tokens=(int(c), int(r)), prompt=str(i))
        for i, (c, r) in enumerate(tokens)
    ]
    card = pair_card(longer, seed=0)
    assert card["length_correlation"][0] == pytest.approx(1.0)
    assert card["length_correlation_in_pair"][0] == pytest.approx(1.0)
    assert card["length_balanced_accuracy"][0] == pytest.approx(0.5)  # right if longer, else wrong


def test_interval_of_a_mean_is_that_of_the_normal_and_clusters_widen_it():
    rng = np.random.default_rng(1)
    values = rng.normal(size=400)
    names = [str(i) for i in range(400)]
    value, low, high = Resampler(names, seed=0).interval(lambda rows: float(values[rows].mean()))
    half = 1.96 * values.std(ddof=1) / 20.0
    assert value == pytest.approx(values.mean())
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    # The same values four times over, four to a cluster, say no more than once.
    again = np.repeat(values, 4)
    clusters = [str(i // 4) for i in range(1600)]
    _, low4, high4 = Resampler(clusters, seed=0).interval(lambda rows: float(again[rows].mean()))
    assert high4 - low4 == pytest.approx(high - low, rel=0.1)
    assert Resampler(["one"], seed=0).interval(lambda rows: 1.0) == [1.0, None, None]


def test_statistic_that_no_resample_changes_has_no_bounds():
    names = [f"p{i}" for i in range(20)]
    draws = Resampler(names, seed=0)
    assert draws.interval(lambda rows: 0.25) == [0.25, None, None]
    value, low, high = draws.interval(lambda rows: float(np.mean(rows)))
    assert low is not None
    assert high is not None
    assert low < value < high


def test_share_of_all_right_is_not_certain():
    # Wilson for 10 of 10: lower bound 1 / (1 + 1.96^2 / 10)
    names = [str(i) for i in range(10)]
    found = Resampler(names, seed=0).share(np.ones(10))
    assert found == pytest.approx([1.0, 1 / (1 + 1.959964**2 / 10), 1.0], abs=1e-6)


def test_best_of_four_counts_the_share_of_good_ones_at_the_top():
    sets = [
        ScoredSet("x", "1", (2.0,), (1.0, 0.0, -1.0)),  # right
        ScoredSet("x", "2", (0.5,), (1.0, 0.0, -1.0)),  # wrong
        ScoredSet("y", "3", (1.0,), (1.0, 0.0, -1.0)),  # one of two at the top is good
        ScoredSet("y", "4", (1.0, 3.0), (2.0, 0.0)),  # the best is good
    ]
    card = set_card(sets, seed=0)
    assert card["best_of_set_accuracy"][0] == pytest.approx(2.5 / 4)
    assert card["chance"] == pytest.approx((0.25 * 3 + 0.5) / 4)
    assert card["sets_by_source"]["y"]["accuracy"][0] == pytest.approx(0.75)


def test_agreement_by_hand():
    other = [pair(-1.0, 0.0), pair(1.0, 0.0), pair(0.0, 2.0), pair(1.0, 0.0), pair(1.0, 0.0)]
    found = agreement(PAIRS, other, seed=0)
    # signs: + + - 0 + against - + - + +: different, same, same, half, same
    assert found["same_side"][0] == pytest.approx(3.5 / 5)
    # accuracies 3.5 / 5 and 3 / 5
    assert found["accuracy_difference"][0] == pytest.approx(0.1)
    assert agreement(PAIRS, PAIRS, seed=0)["correlation"][0] == pytest.approx(1.0)


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(2)
    proxy = {"p": list(rng.normal(size=8)), "q": [0.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 0.0]}
    gold = {"p": list(rng.normal(size=8)), "q": list(rng.normal(size=8))}

    def slow(n: int) -> float:
        means = []
        for name in proxy:
            picked = []
            for subset in itertools.combinations(range(8), n):
                top = max(proxy[name][i] for i in subset)
                picked.append(np.mean([gold[name][i] for i in subset if proxy[name][i] == top]))
            means.append(np.mean(picked))
        return float(np.mean(means))

    points = best_of_n({"p": proxy["p"]}, {"p": gold["p"]}, seed=0)
    assert [point["n"] for point in points] == [1, 2, 4, 8]
    both = best_of_n(proxy, gold, seed=0)
    for point in both:
        assert point["gold"][0] == pytest.approx(slow(point["n"]))
    for point in points:
        means = [
            gold["p"][max(subset, key=lambda i: proxy["p"][i])]
            for subset in itertools.combinations(range(8), point["n"])
        ]
        assert point["gold"][0] == pytest.approx(np.mean(means))
    assert both[2]["kl"] == pytest.approx(math.log(4) - 3 / 4)


def test_no_pairs_is_an_error():
    with pytest.raises(ValueError, match="no held-out pairs"):
        pair_card([], seed=0)
    assert calibration(np.zeros(3), ["a", "b", "c"], seed=0)[0]["accuracy"][0] == 0.5
