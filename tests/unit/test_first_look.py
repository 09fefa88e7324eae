"""``align check`` looks at the files that a recipe names: what is seen, what is not."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import cli
from align.cli import first_look as module

BASE = "  base: {kind: base, path: ORG/BASE}\n"
ROWS = {
    "sft": {"prompt": "Say a.", "completion": "a"},
    "dpo": {"prompt": "Say a.", "chosen": "a", "rejected": "b"},
    "kto": {"prompt": "Say a.", "completion": "a", "label": True},
    "classify": {"text": "a", "label": "good"},
}


def checked(folder: Path, stages: str) -> tuple[int, str]:
    recipe = folder / "my.yaml"
    recipe.write_text(f"name: my\nstages:\n{BASE}{stages}", encoding="utf-8")
    found = CliRunner().invoke(cli, ["check", str(recipe)], catch_exceptions=True)
    return found.exit_code, found.output if found.exception is None else str(found.exception)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stage(kind: str, *data: Path, more: str = "") -> str:
    listed = ", ".join(f"{{path: {path}}}" for path in data)
    return f"  it:\n    kind: {kind}\n    init: base\n    data: [{listed}]\n{more}"


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_of_the_kind_that_the_stage_needs_passes(tmp_path: Path, kind: str):
    code, text = checked(tmp_path, stage(kind, write(tmp_path / "a.jsonl", ROWS[kind])))
    assert code == 0, text
    assert "the first row of 1 data source," in text


@pytest.mark.parametrize(("kind", "given"), [("dpo", "sft"), ("kto", "sft"), ("classify", "dpo")])
def test_a_row_of_another_kind_is_an_error_at_its_line(tmp_path: Path, kind: str, given: str):
    _, text = checked(tmp_path, stage(kind, write(tmp_path / "a.jsonl", ROWS[given])))
    assert "my.yaml:7:19: stages.it.data.0: " in text
    assert "a.jsonl:1" in text


def test_the_supervision_of_a_reward_model_decides_on_its_rows(tmp_path: Path):
    labeled = write(tmp_path / "a.jsonl", ROWS["kto"])
    assert checked(tmp_path, stage("reward", labeled, more="    supervision: answers\n"))[0] == 0
    assert "needs preference" in checked(tmp_path, stage("reward", labeled))[1]


def test_every_missing_file_is_named_in_one_call(tmp_path: Path):
    gone = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    _, text = checked(tmp_path, stage("sft", *gone))
    assert "stages.it.data.0: " in text
    assert "stages.it.data.1: " in text
    assert text.count("no such file") == 2


def test_an_empty_file_is_an_error(tmp_path: Path):
    assert "no row in it" in checked(tmp_path, stage("sft", write(tmp_path / "a.jsonl")))[1]


def test_only_the_first_row_is_read(tmp_path: Path):
    data = write(tmp_path / "a.jsonl", ROWS["sft"], {"nonsense": 1})
    code, text = checked(tmp_path, stage("sft", data))
    assert code == 0
    assert "all other rows" in text


def test_rows_that_own_code_changes_are_not_judged(tmp_path: Path):
    data = write(tmp_path / "a.jsonl", {"nonsense": 1})
    (tmp_path / "my.py").write_text(
        "raise SystemExit('never run by align check')\ndef rows(row): return row\n"
    )
    spec = f"    data: [{{path: {data}, map: '{tmp_path}/my.py:rows'}}]\n"
    code, text = checked(tmp_path, f"  it:\n    kind: sft\n    init: base\n{spec}")
    assert code == 0, text
    assert f"what becomes of the rows of {data}" in text


def test_models_are_found_missing_or_named_as_not_looked_at(tmp_path: Path):
    folder = tmp_path / "empty"
    folder.mkdir()
    data = write(tmp_path / "a.jsonl", ROWS["sft"])

    def other(path: str) -> tuple[int, str]:
        return checked(tmp_path, f"  other: {{kind: base, path: {path}}}\n{stage('sft', data)}")

    assert "stages.other.path: " in other(str(folder))[1]
    assert "no config.json or adapter_config.json" in other(str(folder))[1]
    assert "no such folder, and not a hub id" in other(str(tmp_path / "gone"))[1]
    code, text = other("ORG/NAME")
    assert code == 0
    assert "models of the hub (ORG/NAME)" in text
    (folder / "config.json").write_text("{}")
    assert "the files of 1 model," in other(str(folder))[1]


def test_more_ranks_than_devices_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write(tmp_path / "a.jsonl", ROWS["sft"])
    monkeypatch.setattr(module, "list_gpus", lambda: ["one", "two"])
    told = "stages.it.ranks: 3 ranks, but this machine has 2 GPUs"
    assert told in checked(tmp_path, stage("sft", data, more="    ranks: 3\n"))[1]
    assert "ranks, but" not in checked(tmp_path, stage("sft", data, more="    ranks: 2\n"))[1]
    monkeypatch.setattr(module, "list_gpus", list)
    monkeypatch.setattr(module, "num_cores", lambda: 2)
    told = "stages.it.ranks: 3 ranks, but this machine has 2 CPU cores"
    assert told in checked(tmp_path, stage("sft", data, more="    ranks: 3\n"))[1]
