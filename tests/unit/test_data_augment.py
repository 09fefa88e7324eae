"""Rewording of the user's side: what changes, what never does, and what decides it."""

from align.core.types import Example, TokenRow
from align.data.augment import AugmentedRows, augment
from align.data.sampler import batch_indices, batch_places, pick
from align.recipe.schema import AugmentSpec

WORDS = " ".join(f"w{i}" for i in range(200))
TURNS = [{"role": "system", "content": WORDS}, {"role": "user", "content": WORDS}]
ANSWER = [{"role": "assistant", "content": WORDS}]
ROW = Example(prompt=TURNS, completion=ANSWER, rejected=ANSWER, source="x:1")


def said(example: Example) -> str:
    return example.prompt[1]["content"]


def test_words_are_dropped_from_user_turns_only() -> None:
    spec = AugmentSpec(word_dropout=0.25)
    found = augment(ROW, spec, seed=1, index=0, epoch=0)
    kept = said(found).split()
    assert [w for w in WORDS.split() if w in set(kept)] == kept  # the order stays
    # 200 words, chance 0.75 each: mean 150, standard deviation 6.1; bound five of them.
    assert abs(len(kept) - 150) < 31
    assert found.prompt[0] == TURNS[0]
    assert (found.completion, found.rejected, found.source) == (ANSWER, ANSWER, "x:1")


def test_user_turns_inside_a_conversation_are_reworded_and_answers_are_not() -> None:
    turns = [{"role": "user", "content": "a"}, *ANSWER, {"role": "user", "content": "b"}]
    spec = AugmentSpec(templates=["<{text}>"])
    found = augment(Example(prompt="", completion=turns), spec, seed=0, index=0, epoch=0)
    assert [t["content"] for t in found.completion] == ["<a>", WORDS, "<b>"]
    assert found.prompt == ""
    plain = augment(Example(prompt="q", completion="answer"), spec, seed=0, index=0, epoch=0)
    assert (plain.prompt, plain.completion) == ("<q>", "answer")


def test_one_word_always_stays_and_braces_of_the_text_are_text() -> None:
    spec = AugmentSpec(word_dropout=0.999, templates=["{text}"])
    one = Example(prompt="{text} {x}")
    assert {augment(one, spec, seed=0, index=i, epoch=0).prompt for i in range(20)} == {"{text}"}


def test_wording_depends_on_seed_row_and_epoch_and_on_nothing_else() -> None:
    spec = AugmentSpec(word_dropout=0.5, templates=["a {text}", "b {text}"])
    places = [(s, i, e) for s in range(2) for i in range(2) for e in range(2)]

    def all_said(order: list) -> dict:
        return {(s, i, e): said(augment(ROW, spec, seed=s, index=i, epoch=e)) for s, i, e in order}

    forwards, backwards = all_said(places), all_said(places[::-1])
    assert forwards == backwards
    assert len(set(forwards.values())) == 8


def test_batches_of_any_step_are_the_same_whatever_came_before() -> None:
    """A resumed run asks for step 7 first; the epoch is that of the sampler's stream."""
    rows = [TokenRow((i,), (True,)) for i in range(5)]
    examples = [Example(prompt=f"{i} " + WORDS) for i in range(5)]

    def render(example: Example) -> TokenRow:
        ids = tuple(int(w.lstrip("w")) for w in example.prompt.split())
        return TokenRow(ids, tuple(True for _ in ids))

    augmented = AugmentedRows(
        rows, examples, render=render, spec=AugmentSpec(word_dropout=0.5), seed=3, max_length=999
    )
    late = pick(augmented, 4, seed=6, step=7)
    for step in range(9):
        batch = pick(augmented, 4, seed=6, step=step)
        if step == 7:
            assert batch == late
    places = batch_places(5, 4, seed=6, step=7)  # positions 28 to 31: epochs 5, 5, 6, 6
    assert [epoch for _, epoch in places] == [5, 5, 6, 6]
    order = [batch_indices(5, 5, seed=6, step=e) for e in (5, 6)]
    assert [i for i, _ in places] == [order[0][3], order[0][4], order[1][0], order[1][1]]
    spec = AugmentSpec(word_dropout=0.5)
    expected = [render(augment(examples[i], spec, seed=3, index=i, epoch=e)) for i, e in places]
    assert late == expected
    assert augmented[2] == rows[2]
    assert augmented[:2] == rows[:2]


def test_rows_that_no_longer_fit_stand_as_they_are() -> None:
    def row(length: int) -> TokenRow:
        return TokenRow((1,) * length, (True,) * length)

    lengths = {"<long>": 6, "<short>": 5}
    augmented = AugmentedRows(
        [row(4), row(4)],
        [Example(prompt="long"), Example(prompt="short")],
        render=lambda e: row(lengths[e.prompt]),
        spec=AugmentSpec(templates=["<{text}>"]),
        seed=0,
        max_length=5,
    )
    assert [augmented.in_epoch(i, 0) for i in range(2)] == [row(4), row(5)]
