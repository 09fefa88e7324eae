"""Which settings identify a stage: an upgrade and a change without effect keep what is finished."""

import json
import os
from pathlib import Path
from typing import Annotated

import pytest

from align.core.artifacts import spec_hash
from align.pipeline.planning import plan
from align.recipe.load import load_recipe
from reward_models.identity import Added, Aside, Spec

KNOWN = Path(__file__).with_name("settings_identity.json")
ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("quickstart", "overoptimize")
"""Recipes without files, whose paths would differ between checkouts."""


class Inner(Spec):
    kept: int = 1


class Before(Spec):
    rate: float = 0.5
    inner: Inner = Inner()
    parts: list[Inner] = []
    named: dict[str, Inner] = {}


class InnerAfter(Spec):
    kept: int = 1
    new: Annotated[int, Added("9")] = 0


class After(Spec):
    rate: float = 0.5
    inner: InnerAfter = InnerAfter()
    parts: list[InnerAfter] = []
    named: dict[str, InnerAfter] = {}
    other: Annotated[list[str], Added("9")] = []
    every: Annotated[int, Aside()] = 10


GIVEN = {"inner": {"kept": 2}, "parts": [{}, {"kept": 3}], "named": {"a": {}}}


def test_an_added_key_at_its_default_leaves_the_identity_as_it_was():
    before, after = (c.model_validate(GIVEN).settings() for c in (Before, After))
    assert (
        json.dumps(after)
        == json.dumps(before)
        == json.dumps(Before.model_validate(GIVEN).model_dump())
    )


@pytest.mark.parametrize(
    "change",
    [
        {"other": ["x"]},
        {"inner": {"kept": 2, "new": 1}},
        {"parts": [{"new": 1}, {"kept": 3}]},
        {"named": {"a": {"new": 1}}},
        {"rate": 0.4},
    ],
)
def test_any_other_value_changes_it(change: dict[str, object]):
    assert (
        After.model_validate(GIVEN | change).settings() != Before.model_validate(GIVEN).settings()
    )


def test_a_key_without_effect_is_never_in_it():
    assert After.model_validate({"every": 3}).settings() == After().settings()


def test_shipped_recipes_are_what_they_were():
    """Hashes of the released keys: a difference makes users train finished stages again.

    A new key takes ``Added(version)``. If a result really changes, write the file again:
    ``ALIGN_WRITE=1 pytest tests/unit/test_settings_identity.py``, and say so in CHANGELOG.md.
    """
    found = {}
    for name in RECIPES:
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
        found[name] = {
            stage: spec_hash(spec.settings(), seed=recipe.seed_of(stage), inputs={})
            for stage, spec in recipe.stages.items()
        }
    if os.environ.get("ALIGN_WRITE"):
        KNOWN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(KNOWN.read_text())


def test_saving_more_often_redoes_nothing(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    text = "name: r\nstages:\n  base: {kind: base, path: ORG/NAME}\n"
    text += f"  it: {{kind: sft, init: base, data: [{{path: {rows}}}]}}\n"
    (tmp_path / "r.yaml").write_text(text)
    hashes = {}
    for change in ("", "it.checkpoint_every=7", "it.optim.warn_rate=false", "it.seed=5"):
        recipe = load_recipe(tmp_path / "r.yaml", [change] if change else [])
        spec = recipe.stages["it"]
        hashes[change] = spec_hash(spec.settings(), seed=recipe.seed_of("it"), inputs={})
        assert plan(recipe, tmp_path / "runs")[0].status == "to do"
    assert hashes["it.checkpoint_every=7"] == hashes["it.optim.warn_rate=false"] == hashes[""]
    assert hashes["it.seed=5"] != hashes[""]
