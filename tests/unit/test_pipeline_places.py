"""An error of a stage's process is shown at its place in the recipe, as by align check."""

from pathlib import Path

import pytest

from align.cli.deep import with_places
from align.core.card import Card, Line, table
from align.core.caret import with_source, without_places
from align.pipeline.places import placed
from align.recipe.load import load_resolved

# Columns by hand: the brace of "    tuning: {" is the 13th character of its line.
RECIPE = """\
name: my
sinks: {wandb: true}
stages:
  base: {kind: base, path: ORG/NAME}
  sft:
    kind: sft
    init: base
    data:
      - {path: rows.jsonl}
    tuning: {method: lora, targets: [q_proj, huh]}
    loss: "own.py:loss"
"""
WHERE = {
    # message of the process -> line, column and key, and what follows them
    "tuning.targets: 'huh' names no layer": ("10:37", "sft.tuning.targets: 'huh' names no layer"),
    "tuning.targets.1: is wrong": ("10:46", "sft.tuning.targets.1: is wrong"),
    "tuning.method lora: cannot adapt": ("10:22", "sft.tuning.method: lora: cannot adapt"),
    "rows.jsonl:21: expected text": ("9:16", "sft.data.0.path: rows.jsonl:21: expected text"),
    # A default is not in the file; the mapping around it is.
    "tuning.rank: found 8": ("10:13", "sft.tuning.rank: found 8"),
    "beta, average: no effect": None,
    "loss, epochs: no effect": ("11:11", "sft.loss: loss, epochs: no effect"),
    "sft: rows are too long": ("5:3", "sft: rows are too long"),
    # No keys of this stage.
    "  tuning.targets: a detail": None,
    "another rank: has ended": None,
    "http://host: is gone": None,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text("def loss(x): ...\n")
    (tmp_path / "my.yaml").write_text(RECIPE)
    return tmp_path / "my.yaml"


@pytest.mark.parametrize("said", WHERE)
def test_a_message_about_a_key_gets_its_place(file: Path, said: str):
    found = load_resolved(file)
    (told,) = placed([said], recipe=found.recipe, places=found.places, stage="sft")
    where = WHERE[said]
    assert told == (f"{file}:{where[0]}: stages.{where[1]}" if where else said)


def test_keys_outside_of_the_stages_and_values_of_set_have_places(file: Path):
    found = load_resolved(file, ["sft.tuning.rank=3"])
    said = ["sinks.wandb: true, but it is not installed", "tuning.rank: 3"]
    assert placed(said, recipe=found.recipe, places=found.places, stage="sft") == [
        f"{file}:2:16: sinks.wandb: true, but it is not installed",
        "--set: stages.sft.tuning.rank: 3",
    ]
    assert placed(said, recipe=found.recipe, places={}, stage="sft") == said


def test_the_place_and_its_line_can_be_removed_again(file: Path):
    found = load_resolved(file)
    told = placed(
        ["tuning.rank: 3", "  a detail"], recipe=found.recipe, places=found.places, stage="sft"
    )
    lines = [f"    {line}" for line in with_source("\n".join(told))]
    assert lines[1:3] == [
        "            tuning: {method: lora, targets: [q_proj, huh]}",
        "                    ^",
    ]
    assert without_places(lines) == ["    stages.sft.tuning.rank: 3", "      a detail"]


def test_the_deep_check_shows_the_place_below_what_failed(file: Path) -> None:
    resolved = load_resolved(file)
    failed = Line("preparation", "stopped", "", "fail", "tuning.targets: 'huh' names no layer")
    warned = Line("rows", "few", "", "warn", "tuning.targets: 'huh' names no layer")
    card = Card("sft", "sft", [failed, warned])
    said = table(with_places(card, resolved.recipe, resolved.places))
    # The column of the list is 37; its caret is in the same column as its bracket.
    place, line, caret = said[2:5]
    assert place.endswith(f"-> {file}:10:37: stages.sft.tuning.targets: 'huh' names no layer")
    assert line.endswith("tuning: {method: lora, targets: [q_proj, huh]}")
    assert line.index("[q_proj") == caret.index("^")
    assert said[-1].endswith("-> tuning.targets: 'huh' names no layer")
