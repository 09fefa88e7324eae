"""Sets of answers in the form of RewardBench 2, and the words of refusals."""

import json
from pathlib import Path

import pytest

from align.core.errors import DataError
from align.data.formats.sets import load_sets
from align.recipe.schema import DataSpec
from reward_models.refusals import declines, refusing_side


def write(path: Path, *rows: dict) -> list[DataSpec]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [DataSpec(path=str(path))]


def test_texts_become_turns_and_the_subset_names_the_group(tmp_path: Path):
    turns = [{"role": "assistant", "content": "four"}]
    specs = write(
        tmp_path / "sums.jsonl",
        {"prompt": "2+2?", "chosen": ["4"], "rejected": ["5", "3", "1"], "subset": "Math"},
        {"prompt": "2+2?", "chosen": ["4", turns], "rejected": ["5"]},
    )
    first, second = load_sets(specs)
    assert first.prompt == [{"role": "user", "content": "2+2?"}]
    assert first.rejected[2] == [{"role": "assistant", "content": "1"}]
    assert (first.group, second.group) == ("Math", "sums")
    assert second.chosen[1] == turns


def test_set_keeps_its_system_prompt_and_refuses_what_it_would_drop(tmp_path: Path):
    row = {"prompt": "2+2?", "chosen": ["4"], "rejected": ["5"]}
    (found,) = load_sets(write(tmp_path / "a.jsonl", {**row, "system": "Be brief."}))
    system = {"role": "system", "content": "Be brief."}
    assert found.prompt == [system, {"role": "user", "content": "2+2?"}]
    for key, value in (("tools", [{"name": "f"}]), ("context", "It is."), ("images", ["a.png"])):
        with pytest.raises(DataError, match=f"a.jsonl:1: .*{key}"):
            load_sets(write(tmp_path / "a.jsonl", {**row, key: value}))


def test_faulty_sets_are_all_named(tmp_path: Path):
    specs = write(
        tmp_path / "bad.jsonl",
        {"prompt": "a", "chosen": ["b"]},
        {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": ["c"]},
        {"prompt": "a", "chosen": [], "rejected": ["c"]},
    )
    with pytest.raises(DataError) as found:
        load_sets(specs)
    text = str(found.value)
    assert "bad.jsonl:1: no field ['rejected']" in text
    assert "bad.jsonl:2: chosen: a list of turns is one answer" in text
    assert "bad.jsonl:3: chosen: expected a list of answers" in text


def test_attempts_make_a_set_where_some_are_right_and_some_wrong(tmp_path: Path):
    def row(**attempts: bool) -> dict:
        tried = {k: {"solution": k, "is_correct": good} for k, good in attempts.items()}
        return {"question": "2+2?", "ground_truth": "4", **tried}

    specs = write(tmp_path / "gsm.jsonl", row(a=True, b=False, c=False), row(a=True), row(b=False))
    (found,) = load_sets(specs)
    assert found.chosen == ([{"role": "assistant", "content": "a"}],)
    assert len(found.rejected) == 2


def test_sets_come_from_files_alone():
    with pytest.raises(DataError, match="have no effect"):
        load_sets([DataSpec(world="preference", rows=3)])


def test_refusals_are_told_by_their_opening():
    assert declines("I'm sorry, but I can't help with that.")
    assert declines("I\u2019m sorry.")
    assert not declines("You cannot divide by zero, so the limit is taken.")
    assert not declines("It is safe. " * 20 + "I cannot say more.")
    assert refusing_side("I cannot do that.", "Sure, here it is.") == "chosen"
    assert refusing_side("Sure.", "I apologize, no.") == "rejected"
