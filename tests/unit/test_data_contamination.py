"""Held-out prompts that stand in the training texts are found, with the place of both rows."""

from align.core.types import Example
from align.data.text.contamination import Contamination, find_contamination
from align.preflight.contamination import describe

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"


def row(prompt: str, answer: str = "yes", source: str = "a:1") -> Example:
    turns = [{"role": "user", "content": prompt}]
    return Example(turns, [{"role": "assistant", "content": answer}], source=source)


def found(train: list[Example], heldout: list[Example]) -> Contamination:
    return find_contamination(train, {"x": heldout})["x"]


def test_prompt_quoted_in_another_text_is_found_whatever_its_case_and_marks():
    train = [row("a b", source="a:1"), row("c d", f"It said: {LONG.upper()}, and.", source="a:2")]
    result = found(train, [row(LONG + "?", source="h:1"), row("x " * 9, source="h:2")])
    assert (result.checked, result.places) == (2, [("h:1", "a:2")])
    assert result.note()["frac"] == 0.5


def test_shared_preamble_is_no_contamination_and_a_changed_word_at_the_end_is():
    preamble = "is the following statement something that you would say of your own self here"
    train = [row(f"{preamble} i like the open sea in winter when nobody else is on the beach")]
    other = [row(f"{preamble} no one should ever be told what they have to think about it all")]
    assert found(train, other).places == []
    # 28 words are 16 runs of 13: the last word stands in one of them, 15 / 16 are left.
    late = [row(f"{preamble} i like the open sea in winter when nobody else is on the shore")]
    assert len(found(train, late).places) == 1
    # The 7th last word stands in 7 of them: 9 / 16 are too few.
    middle = [row(f"{preamble} i like the open sea in winter when somebody else is on the beach")]
    assert found(train, middle).places == []


def test_short_prompt_must_be_a_whole_turn_and_a_very_short_one_says_nothing():
    asked = "how often is lamp in lamp pink lamp"
    longer = [row(asked + " pink lamp")]
    assert found(longer, [row(asked)]).places == []
    assert len(found([row("x", asked + ".")], [row(asked + "?")]).places) == 1
    assert found([row("what is two plus two")], [row("what is two plus two")]).skipped == 1


def test_rejected_answers_and_conversations_without_a_prompt_count():
    talk = Example("", [{"role": "user", "content": LONG}, {"role": "assistant", "content": "k"}])
    pair = Example("a b", "c", rejected="w " + LONG)
    assert len(found([pair], [talk]).places) == 1
    assert len(found([talk], [row(LONG.upper())]).places) == 1


def test_limit_decides_between_a_warning_and_a_stop():
    result = Contamination(20, 1, [("h:3", "t:7")])
    assert describe(result, max_frac=0.05).verdict == "warn"
    finding = describe(result, max_frac=0.04)
    assert finding.verdict == "fail"
    assert "h:3 appears in t:7" in finding.remedy
    assert describe(result, max_frac=None).verdict == "warn"
    assert describe(Contamination(0, 9, []), max_frac=0.0).verdict == "ok"
