"""Settings inside of lists of objects: found by their path, but not in the text of a column."""

import json
from pathlib import Path

import pytest

from align.core.errors import DataError
from align.data.formats.detect import to_examples
from align.data.formats.fields import fields_inside, outer_of
from align.data.load import load_examples
from align.recipe.schema import DataSpec
from align.recipe.schema.formats import Kind

U, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "R"}
ROWS: dict[Kind, dict] = {
    "sft": {"messages": [U, A]},
    "preference": {"prompt": "Q", "chosen": "R", "rejected": "S"},
    "unpaired": {"prompt": "Q", "completion": "R", "label": True},
}


def write(path: Path, row: dict) -> str:
    path.write_text(json.dumps(row), encoding="utf-8")
    return str(path)


def test_fields_have_the_path_that_leads_to_them():
    row = {
        "a": 1,
        "b": {"c": 2, "d": [{"e": 3}]},
        "f": [{"g": 4}, 5, [{"h": 6}]],
        "text": '{"weight": 0}',
        "i_column": [{"weight": 0}],
    }
    found = dict(fields_inside(row))
    assert {k: v for k, v in found.items() if isinstance(v, int)} == {
        "b.c": 2,
        "b.d[0].e": 3,
        "f[0].g": 4,
        "f[2][0].h": 6,
    }
    assert [outer_of(name) for name in found] == ["b", "b", "b", "f", "f"]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("items", "path"),
    [
        ([{"start": 0, "weight": 0.5}], "spans[0].weight"),
        ([{"start": 0}, {"start": 4, "lossMask": [0, 1]}], "spans[1].lossMask"),
        ([[{"is_masked": True}]], "spans[0][0].is_masked"),
        ([{"more": {"train": False}}], "spans[0].more.train"),
        ({"turns": [{}, {"loss": 0}]}, "spans.turns[1].loss"),
    ],
)
def test_a_loss_setting_in_a_list_of_objects_is_refused_by_its_path(
    kind: Kind, items: object, path: str
):
    with pytest.raises(DataError) as refused:
        to_examples({**ROWS[kind], "spans": items}, kind=kind, format="auto", source="a:7")
    assert str(refused.value).startswith(f"a:7: {path}: ")
    # No rename reads an item of a list, so only the whole column is offered.
    assert "rename: {spans: spans_column}" in str(refused.value)
    assert ": weight}" not in str(refused.value)
    aside = {**ROWS[kind], "spans_column": items}
    (kept,) = to_examples(aside, kind=kind, format="auto", source="a:7")
    assert kept.columns["spans_column"] == items


def test_prompts_keep_lists_of_objects_as_columns():
    row = {"prompt": "Q", "spans": [{"weight": 0.5}]}
    (kept,) = to_examples(row, kind="prompts", format="auto", source="a:7")
    assert kept.columns == {"spans": [{"weight": 0.5}]}


@pytest.mark.parametrize("kind", ["sft", "prompts"])
def test_a_system_prompt_in_a_list_of_objects_is_no_column(tmp_path: Path, kind: Kind):
    row = {"prompt": "Q", "setup": [{"system_prompt": "Rhyme."}]}
    row |= {"completion": "R"} if kind == "sft" else {}
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(
        DataError, match=r"setup\[0\]\.system_prompt: .*\{setup: setup_column\}"
    ) as e:
        load_examples([DataSpec(path=path)], kind=kind, seed=0)
    assert ": system}" not in str(e.value)
    aside = DataSpec(path=path, rename={"setup": "setup_column"})
    (example,) = load_examples([aside], kind=kind, seed=0)
    assert example.prompt == "Q"


@pytest.mark.parametrize("kind", ROWS)
def test_text_that_is_json_stays_text(kind: Kind):
    row = {**ROWS[kind], "spans": '[{"weight": 0.5}]', "meta": '{"loss": 0}'}
    (kept,) = to_examples(row, kind=kind, format="auto", source="a:7")
    assert {key: kept.columns[key] for key in ("spans", "meta")} == {
        "spans": '[{"weight": 0.5}]',
        "meta": '{"loss": 0}',
    }


@pytest.mark.parametrize("kind", ROWS)
def test_words_of_the_loss_that_are_no_numbers_say_nothing(kind: Kind):
    row = {**ROWS[kind], "spans": [{"weight": "heavy"}, {"loss": None}, {"train": "fast"}]}
    (kept,) = to_examples(row, kind=kind, format="auto", source="a:7")
    assert kept.columns["spans"] == row["spans"]
