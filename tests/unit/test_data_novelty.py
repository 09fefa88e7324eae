import random
from zlib import crc32

import numpy as np
import pytest

from align.data.text.ngrams import word_texts, words
from align.data.text.similarity import diverse, near_duplicates, nearest, rouge_l, tfidf
from align.recipe.schema import SelfInstructStage
from align.stages.data.self_instruct import refusal


def slow_lcs(a, b):
    if not a or not b:
        return 0
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


def test_rouge_l_by_hand():
    killed = word_texts("police killed the gunman")
    # Lin 2004, section 3.1: "police killed the gunman" against "police kill the gunman": 3 of 4.
    assert (
        rouge_l(word_texts("police killed the gunman"), word_texts("Police kill the gunman."))
        == 0.75
    )
    # ... and against "the gunman kill police": the longest common subsequence is "the gunman".
    assert rouge_l(killed, word_texts("the gunman kill police")) == 0.5


def test_rouge_l_equals_a_slow_definition():
    dice = random.Random(0)
    for _ in range(200):
        a, b = ([dice.choice("abcd") for _ in range(dice.randrange(0, 9))] for _ in range(2))
        wanted = 2 * slow_lcs(a, b) / (len(a) + len(b)) if a and b else 0.0
        assert rouge_l(a, b) == pytest.approx(wanted)


def test_nearest_is_the_best_of_all_in_spite_of_its_short_cut():
    dice = random.Random(1)
    pool = [[dice.choice("abcde") for _ in range(dice.randrange(1, 12))] for _ in range(50)]
    for _ in range(20):
        text = [dice.choice("abcde") for _ in range(6)]
        place, value = nearest(text, pool)
        assert value == max(rouge_l(text, other) for other in pool)
        assert rouge_l(text, pool[place]) == value
    assert nearest(["a"], []) == (-1, 0.0)


def test_an_instruction_like_a_seed_or_like_a_new_one_is_refused():
    spec = SelfInstructStage.model_validate(
        {"kind": "self_instruct", "init": "x", "seeds": [{"path": "x"}], "target": 1}
    )
    seed = {"name": "seed", "instruction": "Name the capital of a country"}
    new = {"name": "new", "instruction": "Write a poem on the sea at night"}
    # 5 of 6 and 6 words in common order: 10 / 12; 7 of 8 and 8: 14 / 16.
    found = refusal("Name the capital of any country", whole=True, known=[seed, new], spec=spec)
    assert found == ("like a known one", {"rouge_l": 0.8333, "nearest": "seed"})
    found = refusal("Write a poem on the sea at dawn.", whole=True, known=[seed, new], spec=spec)
    assert found == ("like a known one", {"rouge_l": 0.875, "nearest": "new"})
    # 3 of 6 and 6: far enough.
    reason, details = refusal("Name the river of no town", whole=True, known=[seed, new], spec=spec)
    assert (reason, details["rouge_l"]) == (None, 0.5)
    assert refusal("Name it", whole=True, known=[], spec=spec)[0] == "too short"
    assert (
        refusal("Describe the picture of a cat", whole=True, known=[], spec=spec)[0]
        == "not for a text model"
    )
    assert refusal("Name the capital of any country", whole=False, known=[], spec=spec)[0] == "cut"


def test_planted_near_duplicates_are_found_and_nothing_else():
    dice = random.Random(2)
    vocabulary = [f"word{i}" for i in range(400)]
    originals = [" ".join(dice.choice(vocabulary) for _ in range(40)) for _ in range(60)]
    copies = []
    for i in range(20):
        changed = originals[i].split()
        changed[dice.randrange(40)] = "other"  # at most 3 of 38 triples: Jaccard >= 35 / 41
        copies.append(" ".join(changed))
    found = list(near_duplicates(originals + copies, threshold=0.8))
    assert [(late, early) for late, early, _ in found] == [(60 + i, i) for i in range(20)]
    assert all(35 / 41 <= value < 1.0 for _, _, value in found)


def test_tfidf_by_hand():
    vectors = tfidf(["a b", "a c", "a a a"])
    # Unit vectors; "a" is everywhere (idf 1), b and c in one of 3 (idf 1 + ln 3).
    weight = 1 + np.log(3)
    assert float(vectors[0] @ vectors[1]) == pytest.approx(1 / (1 + weight**2), abs=1e-6)
    assert float(vectors[0] @ vectors[2]) == pytest.approx(1 / np.sqrt(1 + weight**2), abs=1e-6)


def test_diverse_takes_in_order_and_passes_over_what_is_near():
    angles = np.deg2rad([0.0, 5.0, 90.0, 92.0, 45.0])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    # 1 - cos 5 deg = 0.0038 and 1 - cos 2 deg = 0.0006 lie below 0.01; 45 degrees lies above.
    taken, passed = diverse(vectors, [3, 2, 0, 1, 4], rows=3, min_distance=0.01)
    assert taken == [3, 0, 4]
    assert sorted(passed) == [1, 2]
    assert passed[1] == pytest.approx(1 - np.cos(np.deg2rad(5.0)), abs=1e-6)


def test_a_word_is_the_same_wherever_words_are_compared():
    text = "Don't stop: Ünïcode, it's 3 a.m.!"
    assert word_texts(text) == ["dont", "stop", "ünïcode", "its", "3", "am"]
    assert words(text) == [crc32(word.encode()) for word in word_texts(text)]
    # The check and the curate stage agree on what is nearly the same: marks and case only.
    texts = ["One, two; THREE four five six.", "one two three four five six"]
    assert [found[:2] for found in near_duplicates(texts, threshold=1.0)] == [(1, 0)]
