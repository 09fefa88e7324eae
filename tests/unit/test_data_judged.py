"""Rows whose answers or steps are judged one by one, and pairs that tie."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from align.core.errors import DataError
from align.core.types import Example
from align.data.formats.detect import detect, to_examples
from align.data.render.chat import is_tie
from align.recipe.schema import RewardStage

DATA = [{"path": "x.jsonl"}]


def read(row: dict, kind: str) -> list[Example]:
    return to_examples(row, kind=kind, format="auto", source="a.jsonl:1")  # type: ignore[arg-type]


def test_both_forms_of_steps_are_read_alike():
    ours = {
        "prompt": "2+2+2?",
        "steps": [{"text": "2+2=4", "label": True}, {"text": "4+2=7", "label": False}],
    }
    trl = {"prompt": "2+2+2?", "completions": ["2+2=4", "4+2=7"], "labels": [True, False]}
    assert detect(ours, kind="steps", source="a:1") == "steps"
    for row in (ours, trl):
        (example,) = read(row, "steps")
        assert example.prompt == [{"role": "user", "content": "2+2+2?"}]
        assert example.columns["steps"] == ["2+2=4", "4+2=7"]
        assert example.columns["step_labels"] == [True, False]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "a", "steps": []}, "the list is empty"),
        ({"prompt": "a", "steps": ["b"]}, "a list of {text, label}"),
        ({"prompt": "a", "steps": [{"text": "b", "label": 2}]}, r"steps\[0\]: label"),
        ({"prompt": "a", "completions": ["b"], "labels": []}, "equal length"),
    ],
)
def test_faulty_steps_are_named(row: dict, told: str):
    with pytest.raises(DataError, match=told):
        read(row, "steps")


def test_steps_are_no_pairs():
    with pytest.raises(DataError, match="is steps data, but the stage needs preference"):
        read({"prompt": "a", "steps": [{"text": "b", "label": True}]}, "preference")


def test_attempts_with_outcomes_become_judged_answers():
    row = {
        "question": "2+2?",
        "ground_truth": "4",
        "small": {"solution": "5", "is_correct": False},
        "large": {"solution": "4", "is_correct": True},
        "other": {"solution": "4", "is_correct": True},
    }
    found = read(row, "unpaired")
    assert [(e.completion[0]["content"], e.label) for e in found] == [("5", False), ("4", True)]


@pytest.mark.real
def test_gsm8k_attempts_hold_good_and_bad_ones(real_data: Path):
    lines = (real_data / "data/raw/gsm8k_example_model_solutions.jsonl").read_text().splitlines()
    labels = [e.label for line in lines[:50] for e in read(json.loads(line), "unpaired")]
    assert {True, False} == set(labels)


def test_tie_is_read_from_its_column():
    assert is_tie(Example("a", "b", "c", columns={"tie": True}))
    assert is_tie(Example("a", "b", "c", columns={"tie": "true"}))
    assert not is_tie(Example("a", "b", "c"))
    with pytest.raises(DataError, match="tie: expected true or false"):
        is_tie(Example("a", "b", "c", columns={"tie": 2}))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"noise_folds": 1}, "noise_folds"),
        ({"tie_margin": 1.0, "label_smoothing": 0.1}, "cannot be combined"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(keys: dict, told: str):
    with pytest.raises(ValidationError, match=told):
        RewardStage(kind="reward", init="sft", data=DATA, **keys)


def test_a_resolved_reward_stage_is_valid_again():
    for supervision in ("pairs", "answers", "steps"):
        stage = RewardStage(kind="reward", init="sft", data=DATA, supervision=supervision)  # type: ignore[arg-type]
        assert RewardStage.model_validate(stage.model_dump(mode="json")) == stage
