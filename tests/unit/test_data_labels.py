"""Exported labels as a data source: the newest snapshot or a pinned one, never a changed file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from align.cli import cli
from align.core.errors import DataError, RecipeError
from align.core.identity import changed_file
from align.data.labels import find_snapshot, labels_file, snapshot_files, write_snapshot
from align.data.load import load_examples
from align.data.reading import read_log
from align.data.reading.provenance import file_records, named_files
from align.recipe.load import load_recipe
from align.recipe.schema import DataSpec


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ALIGN_LABELS", raising=False)
    return tmp_path / "labels"


def pair(i: int, text: str = "yes") -> dict[str, Any]:
    return {"prompt": f"question {i}?", "chosen": f"{text} {i}", "rejected": f"no {i}"}


def export(count: int, name: str = "helpful") -> Path:
    rows = [pair(i) for i in range(count)]
    liked = [{"prompt": "question 0?", "completion": "yes 0", "label": True}]
    return write_snapshot(name, {"preference.jsonl": rows, "unpaired.jsonl": liked}, {"votes": 1})


def test_a_recipe_reads_the_newest_snapshot_or_the_one_it_names():
    export(2)
    export(3)
    newest = load_examples([DataSpec(labels="helpful")], kind="preference", seed=0)
    first = load_examples([DataSpec(labels="helpful@1")], kind="preference", seed=0)
    assert [(e.completion, e.rejected) for e in first] == [("yes 0", "no 0"), ("yes 1", "no 1")]
    assert [e.prompt for e in newest] == ["question 0?", "question 1?", "question 2?"]


def test_the_kind_of_stage_selects_the_file():
    export(2)
    (liked,) = load_examples([DataSpec(labels="helpful")], kind="unpaired", seed=0)
    assert (liked.completion, liked.label) == ("yes 0", True)
    chosen = load_examples([DataSpec(labels="helpful", answers="chosen")], kind="sft", seed=0)
    assert [e.completion for e in chosen] == ["yes 0", "yes 1"]
    prompts = load_examples([DataSpec(labels="helpful")], kind="prompts", seed=0)
    assert [e.prompt for e in prompts] == ["question 0?", "question 1?"]
    with pytest.raises(DataError, match=r"has no steps rows, only: preference, unpaired"):
        load_examples([DataSpec(labels="helpful")], kind="steps", seed=0)


def test_the_bytes_and_the_id_follow_from_the_rows_alone(folder: Path):
    first = export(2)
    name = first.name
    text = (first / "preference.jsonl").read_bytes()
    assert export(2) == first, "the same labels are the same snapshot"
    record = (first / "snapshot.json").read_bytes()
    assert name == "0001-" + hashlib.sha256(record).hexdigest()[:12]
    listed = json.loads(record)["files"]["preference.jsonl"]
    assert listed == {"rows": 2, "sha256": hashlib.sha256(text).hexdigest()}
    first.rename(folder / "elsewhere")
    again = export(2)
    assert (again.name, (again / "preference.jsonl").read_bytes()) == (name, text)


def test_a_changed_snapshot_is_refused():
    path = export(2) / "preference.jsonl"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("yes", "YES"))
    with pytest.raises(DataError, match=r"preference.jsonl: was changed since the snapshot"):
        labels_file("helpful", "preference")
    path.unlink()
    with pytest.raises(DataError, match=r"preference.jsonl: is missing since the snapshot"):
        labels_file("helpful", "preference")


def test_a_changed_record_is_refused():
    path = export(2) / "snapshot.json"
    path.chmod(0o644)
    path.write_text('{"files": {"preference.jsonl": 3}}')
    with pytest.raises(DataError, match=r"snapshot.json: was changed"):
        find_snapshot("helpful")


def test_a_missing_project_or_snapshot_is_named():
    export(1)
    with pytest.raises(DataError, match=r"no snapshot in labels/helpfull .*there are helpful"):
        load_examples([DataSpec(labels="helpfull")], kind="preference", seed=0)
    with pytest.raises(DataError, match=r"helpful@7: no snapshot 7; labels/helpful has 1"):
        load_examples([DataSpec(labels="helpful@7")], kind="preference", seed=0)


def test_a_newer_snapshot_is_another_input():
    files = named_files(DataSpec(labels="helpful"), {})
    assert files == {}, "without a snapshot, reading reports it"
    old = export(2)
    spec = DataSpec(labels="helpful")
    records = file_records(named_files(spec, {}))
    assert sorted(records) == [str(path) for path in snapshot_files("helpful")]
    digest = hashlib.sha256((old / "preference.jsonl").read_bytes()).hexdigest()
    assert records[str(old / "preference.jsonl")]["sha256"] == digest
    assert changed_file(records, named_files(spec, {})) is None
    new = export(3)
    difference = changed_file(records, named_files(spec, {}))
    assert difference == f"{new / 'preference.jsonl'} is new"
    assert changed_file(records, named_files(DataSpec(labels="helpful@1"), {})) is None


def test_a_running_stage_keeps_its_snapshot():
    export(2)
    records = file_records(named_files(DataSpec(labels="helpful"), {}))
    read_log.expect({path: record["sha256"] for path, record in records.items()})
    try:
        export(3)
        found = load_examples([DataSpec(labels="helpful")], kind="preference", seed=0)
    finally:
        read_log.expect(None)
    assert len(found) == 2


def test_the_tenth_thousandth_snapshot_is_still_the_newest(folder: Path):
    first = export(1)
    first.rename(first.with_name(first.name.replace("0001", "9999")))
    assert export(2).name.startswith("10000-")
    assert find_snapshot("helpful").name.startswith("10000-")


def test_the_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALIGN_LABELS", str(tmp_path / "elsewhere"))
    assert export(1).parent == tmp_path / "elsewhere" / "helpful"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{labels: helpful, path: a.jsonl}", "exactly one of 'path', 'stage', 'labels' and"),
        ("{labels: ../helpful}", "labels"),
        ("{labels: helpful, format: hh}", "has no effect on exported labels"),
        ("{labels: helpful, config: main}", "has no effect without 'path'"),
        ("{labels: helpful, split: test}", "expected one of all, train, heldout"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(source: str, message: str, tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nstages:\n  base: {kind: base, path: models/x}\n"
        f"  dpo: {{kind: dpo, init: base, data: [{source}]}}\n"
    )
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)


def test_check_looks_at_the_snapshot_that_a_recipe_names(tmp_path: Path):
    export(1)
    recipe = tmp_path / "r.yaml"
    for source, kind, message in (
        ("helpful", "dpo", "the first row of 1 data source"),
        ("helpful", "sft", "has no sft rows, only: preference, unpaired"),
        ("helpfull", "dpo", "r.yaml:7:21: stages.it.data.0: labels: helpfull: no snapshot in"),
        ("helpful@4", "dpo", "no snapshot 4"),
    ):
        recipe.write_text(
            "name: r\nstages:\n  base: {kind: base, path: ORG/BASE}\n"
            f"  it:\n    kind: {kind}\n    init: base\n    data: [{{labels: {source}}}]\n"
        )
        found = CliRunner().invoke(cli, ["check", str(recipe)])
        assert message in (str(found.exception) if found.exception else found.output)
