"""What a recipe may say of evaluation while training and of the guard."""

from typing import Any

import pytest
from pydantic import ValidationError

from align.recipe.schema import GrpoStage, references

RULE = {"kind": "regex", "pattern": "x"}


def stage(**watch: Any) -> GrpoStage:
    given = {"every": 5, "prompts": [{"world": "prompts", "rows": 9}], "gold": [RULE]}
    return GrpoStage.model_validate(
        {
            "kind": "grpo",
            "init": "sft",
            "steps": 9,
            "prompts": [{"world": "prompts", "rows": 9}],
            "rewards": [{"kind": "scalar", "model": "rm"}, {**RULE, "weight": 0.0}],
            "watch": {**given, **watch},
        }
    )


def test_gold_models_are_inputs_of_the_stage() -> None:
    gold = [{"kind": "scalar", "model": "other"}]
    found = references(stage(gold=gold))
    assert found == {"init": "sft", "rewards.0.model": "rm", "watch.gold.0.model": "other"}


def test_guard_refuses_a_gold_scorer_that_is_trained_on() -> None:
    trained = {"kind": "scalar", "model": "rm", "weight": 2.0, "name": "gold"}
    with pytest.raises(ValidationError, match="'gold' is also a training reward"):
        stage(gold=[trained], guard={})
    # As a held-out score, to choose a checkpoint by, it is fine; and so is a reward of no weight.
    assert stage(gold=[trained]).watch is not None
    assert stage(gold=[RULE], guard={}).watch is not None


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        ({"guard": {"window": 2}}, "greater than or equal to 3"),
        ({"guard": {"stop_on": ["vibes"]}}, "gold_slope"),
        ({"gold": [RULE, RULE]}, "give each its own 'name'"),
        ({"prompts": []}, "at least 1 item"),
        ({"every": 0}, "greater than or equal to 1"),
    ],
)
def test_watch_refuses_settings_that_cannot_work(watch: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        stage(**watch)
