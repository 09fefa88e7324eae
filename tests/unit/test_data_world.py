"""The generated world: right answers, sides that never meet, the same bytes for the same seed."""

import hashlib
import re

import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.load import check_overlap
from align.data.split import hash_fraction
from align.data.toy import (
    ANSWER_PATTERN,
    BRIEF_WORDS,
    FINISHED_PATTERN,
    KINDS,
    MANNERS,
    OPENING_PATTERN,
    POLITE_PATTERN,
    PREFERRED,
    generate,
)

WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
]
PLACE = {word: kind for kind, words in KINDS.items() for word in words}


def question_of(example: Example) -> str:
    (turn,) = example.prompt
    assert turn["role"] == "user"
    return turn["content"]


def solve(question: str) -> str:
    """Answer a question from its words alone (nothing of the generator but the four kinds)."""
    words = re.findall(r"[a-z]+", question)
    numbers = [WORDS.index(w) for w in words if w in WORDS]
    nouns = [w for w in words if w in PLACE]
    if "plus" in words:
        return WORDS[numbers[0] + numbers[1]]
    if "minus" in words:
        return WORDS[numbers[0] - numbers[1]]
    if "largest" in words or "smallest" in words:
        return WORDS[(max if "largest" in words else min)(numbers)]
    if "reverse" in words or "back" in words:
        return " ".join(nouns[::-1])
    if "sort" in words or "order" in words:
        return " ".join(WORDS[n] for n in sorted(numbers))
    if "count" in words or "many" in words or "often" in words:
        return WORDS[nouns[1:].count(nouns[0])]
    kinds = [PLACE[noun] for noun in nouns]
    return next(n for n in nouns if kinds.count(PLACE[n]) == 1)


def answered(text: str) -> str:
    found = re.search(ANSWER_PATTERN, text)
    assert found, text
    return found[1]


def test_world_answers_agree_with_an_independent_solver() -> None:
    tasks = set()
    seen: dict[bool, list[bool]] = {True: [], False: []}
    for example in generate("sft", rows=4000, seed=3):
        right = solve(question_of(example))
        assert example.columns["answer"] == right
        text = example.completion[0]["content"]
        careless = text.startswith(("well", "hm", "ugh", "so")) or not re.search(
            r"is [a-z ]+\.$", text
        )
        wrong = answered(text) != right
        assert careless or not wrong
        seen[careless].append(wrong)
        tasks.add(example.columns["task"])
    assert tasks == {"arithmetic", "sort", "reverse", "count", "pick"}
    # Half of the careless demonstrations are wrong: binomial, five standard deviations.
    assert abs(sum(seen[True]) / len(seen[True]) - 0.5) < 5 * 0.5 / len(seen[True]) ** 0.5


def test_world_pairs_differ_in_manner_or_in_correctness() -> None:
    wrong = 0
    for example in generate("preference", rows=2000, seed=1):
        right = solve(question_of(example))
        chosen, rejected = example.completion[0]["content"], example.rejected[0]["content"]
        assert answered(chosen) == right
        if answered(rejected) == right:
            assert re.fullmatch(POLITE_PATTERN, chosen)
            assert not re.fullmatch(POLITE_PATTERN, rejected)
        else:
            wrong += 1
            assert rejected == chosen.replace(f" {right}", f" {answered(rejected)}", 1)
    # Binomial(2000, 0.25) has standard deviation 19.4; five of them on each side.
    assert abs(wrong - 500) < 97


def instance_of(example: Example) -> tuple:
    """Say what a question is about whatever its wording, from the words of the question."""
    question = question_of(example)
    words = re.findall(r"[a-z]+", question)
    items = [w for w in words if w in PLACE or w in WORDS]
    task = example.columns["task"]
    if task == "arithmetic":
        return task, solve(question), *sorted(items)
    return (task, items[0], *sorted(items[1:])) if task == "count" else (task, *sorted(items))


def test_world_train_and_heldout_instances_never_meet() -> None:
    rows = {
        split: [
            example
            for kind in ("sft", "preference", "prompts")
            for example in generate(kind, rows=count, seed=7, split=split)
        ]
        for split, count in (("train", 3000), ("heldout", 300))
    }
    train, heldout = ({instance_of(e) for e in rows[split]} for split in rows)
    assert len(heldout) > 200
    assert not train & heldout
    check_overlap(rows["train"], rows["heldout"])


def test_world_corpus_states_no_heldout_instance() -> None:
    # The sums of the corpus can be read back from its prose; held-out ones must not be there.
    text = " ".join(e.completion for e in generate("corpus", rows=2000, seed=0, split="train"))
    sums = re.findall(r"(\w+) plus (\w+), get", text)
    assert len(sums) > 100
    for a, b in sums:
        key = "arithmetic|" + " ".join(sorted(["plus", a, b]))
        assert hash_fraction(key) >= 0.1


@pytest.mark.parametrize("kind", ["corpus", "sft", "preference", "prompts"])
def test_world_same_seed_gives_the_same_rows_and_another_seed_others(kind: str) -> None:
    first = list(generate(kind, rows=50, seed=11))
    assert first == list(generate(kind, rows=50, seed=11))
    assert first != list(generate(kind, rows=50, seed=12))


def test_world_bytes_are_frozen() -> None:
    # Written down once: a change of the generator changes every quickstart number in the README.
    rows = [
        repr((e.prompt, e.completion, e.rejected)) for e in generate("preference", rows=200, seed=0)
    ]
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    assert digest[:16] == "094ad2e168a9391e"


def test_world_patterns_tell_the_preferred_manner_from_the_others() -> None:
    for manner, forms in MANNERS.items():
        for form in forms:
            for value in ("12", "cat dog fox bee"):
                text = form.format(x=value)
                assert answered(text) == value
                assert bool(re.fullmatch(POLITE_PATTERN, text)) == (manner == PREFERRED)
                assert bool(re.search(OPENING_PATTERN, text)) == (manner == PREFERRED)
                assert bool(re.search(FINISHED_PATTERN, text)) == (manner != "unfinished")
    longest = [form.format(x="cat dog fox bee") for form in MANNERS[PREFERRED]]
    assert max(len(text.split()) for text in longest) <= BRIEF_WORDS


def test_world_is_small() -> None:
    rows = list(generate("sft", rows=3000, seed=2))
    corpus = " ".join(e.completion for e in generate("corpus", rows=2000, seed=2))
    spoken = " ".join(f"{question_of(e)} {e.completion[0]['content']}" for e in rows)
    assert len(set(re.findall(r"[a-z]+", corpus))) <= 150
    assert set(re.findall(r"[a-z]+", spoken)) <= set(re.findall(r"[a-z]+", corpus))
    pieces = [len(re.findall(r"\w+|[^\w\s]", question_of(e))) for e in rows]
    assert max(pieces) <= 30


def test_world_prompts_are_distinct_and_run_out_with_an_error() -> None:
    rows = [question_of(e) for e in generate("prompts", rows=800, seed=0, split="heldout")]
    assert len(set(rows)) == 800
    with pytest.raises(DataError, match="no heldout instance"):
        list(generate("prompts", rows=30, seed=0, split="heldout", heldout_frac=0.0))


@pytest.mark.parametrize("kind", ["sft", "preference", "prompts"])
def test_rows_of_chosen_tasks_hold_no_other(kind: str) -> None:
    rows = list(generate(kind, rows=60, seed=1, tasks=["sort", "count"]))
    assert len(rows) == 60
    assert {row.columns["task"] for row in rows} == {"sort", "count"}
