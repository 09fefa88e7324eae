"""``map``: a function of the user makes the rows of a source, in every format and command."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import cli
from align.core.artifacts import spec_hash
from align.core.errors import DataError, RecipeError
from align.data import own_map
from align.data.check import Request, check_data
from align.data.load import load_examples
from align.recipe.load import load_recipe
from align.recipe.schema import DataSpec

CODE = """
import os, sys, time
import numpy as np

def to_messages(row):
    print("a line")
    said = [("user", row["frage"]), ("assistant", row["antwort"])]
    said = [{"role": role, "content": text} for role, text in said]
    return {"messages": said, "level": np.int64(3)}

def several(row):
    for i in range(int(row["antwort"])):
        yield {"question": row["frage"] + str(i), "answer": "yes"}

def question(row): return {"prompt": row["frage"], "answer": row["antwort"]}
def missing(row): return {"messages": row["fragen"]}
def number(row): return 3
def text(row): return "text"
def unfit(row): return {"prompt": "p", "answer": {1, 2}}
def leaves(row): os._exit(0)
def exits(row): sys.exit(0)
def hangs(row): time.sleep(600)
def documents(row): return {"text": row.upper()}
"""
ROWS = [{"frage": f"Was ist {i}?", "antwort": str(i)} for i in range(3)]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "my.py"
    file.write_text(CODE)
    return file


def write(folder: Path, kind: str) -> Path:
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif kind == "csv":
        lines = ["frage,antwort", *(f"{row['frage']},{row['antwort']}" for row in ROWS)]
        file.write_text("\n".join(lines) + "\n")
    else:
        lines = [json.dumps(row) for row in ROWS]
        file.write_text("\n".join(lines) + "\n" if kind == "jsonl" else f"[{','.join(lines)}]")
    return file


def load(file: Path, function: str, kind="sft", **more):
    return load_examples([DataSpec(path=str(file), map=function, **more)], kind=kind, seed=0)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_rows_of_every_kind_of_file_are_mapped(code: Path, tmp_path: Path, kind: str):
    found = load(write(tmp_path, kind), f"{code}:to_messages")
    assert [e.completion[-1]["content"] for e in found] == ["0", "1", "2"]
    assert [dict(e.columns) for e in found] == [{"level": 3}] * 3
    # The place is that of the row in the file.
    assert all(e.source.startswith(f"{tmp_path}/rows.{kind}:") for e in found)


def test_plain_text_is_mapped_too(code: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    found = load(tmp_path / "a.txt", f"{code}:documents", kind="corpus")
    assert [e.completion for e in found] == ["ONE", "TWO"]


def test_a_row_may_become_several_or_none(
    code: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    found = load(
        write(tmp_path, "jsonl"), f"{code}:several", rename={"question": "prompt"}, kind="prompts"
    )
    assert [e.prompt for e in found] == ["Was ist 1?0", "Was ist 2?0", "Was ist 2?1"]
    assert [e.source.rpartition(":")[2] for e in found] == ["2", "3", "3"]
    assert "3 rows became 3; 1 became none" in caplog.text


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("missing", "KeyError: 'fragen' (FILE:16)"),
        ("number", "returned a int; expected a row (a dict), a list of rows or None"),
        ("text", "returned a str; expected a row (a dict), a list of rows or None"),
        ("unfit", "a set cannot be part of a row; expected JSON values"),
        ("exits", "SystemExit: 0 (FILE:21)"),
    ],
)
def test_an_error_has_the_place_of_the_row_and_of_the_code(
    code: Path, tmp_path: Path, function: str, said: str
):
    file = write(tmp_path, "jsonl")
    with pytest.raises(DataError) as caught:
        load(file, f"{code}:{function}")
    said = said.replace("FILE", str(code))
    lines = str(caught.value).split("\n")
    expected = [f"{file}:{i}: map {code}:{function}: {said}" for i in (1, 2, 3)]
    assert lines == expected


def test_a_row_for_which_it_hangs_or_leaves_is_named_at_once(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write(tmp_path, "jsonl")
    with pytest.raises(DataError, match=rf"{file}:1: map {code}:leaves: map died; expected a row"):
        load(file, f"{code}:leaves")
    monkeypatch.setattr(own_map, "DEADLINE_S", 2.0)
    with pytest.raises(DataError, match=rf"{file}:1: map {code}:hangs: map timed out"):
        load(file, f"{code}:hangs")
    code.write_text("1 / 0")
    with pytest.raises(DataError, match=rf"cannot be loaded: ZeroDivisionError.*{code}:1"):
        load(file, f"{code}:hangs")


def test_the_check_and_the_view_see_the_mapped_rows(code: Path, tmp_path: Path):
    file = write(tmp_path, "jsonl")
    report = check_data(Request(path=str(file), map=f"{code}:to_messages"))
    assert (report.kind, report.rows, report.good) == ("sft", 3, 3)
    assert not report.tally.total("error")
    bad = CliRunner().invoke(cli, ["data", "check", str(file), "--map", f"{code}:missing"])
    assert bad.exit_code == 2
    assert "D046" in bad.output
    assert f"{file}:1" in bad.output
    unknown = CliRunner().invoke(cli, ["data", "check", str(file), "--map", f"{code}:to_message"])
    assert "did you mean 'to_messages'?" in str(unknown.exception)
    out = tmp_path / "out.jsonl"
    command = ["data", "convert", str(file), str(out), "--to", "prompt"]
    done = CliRunner().invoke(cli, [*command, "--map", f"{code}:question"])
    assert done.exit_code == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in made] == [row["frage"] for row in ROWS]


RECIPE = """
name: own
stages:
  base: {{kind: base, path: {folder}}}
  sft:
    kind: sft
    init: base
    data: [{{{data}}}]
    steps: 1
"""


def test_a_recipe_names_it_from_its_folder_and_its_source_identifies_the_stage(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "r.yaml"
    monkeypatch.chdir("/")

    def read(data: str):
        file.write_text(RECIPE.format(folder=tmp_path, data=data))
        return load_recipe(file).stages["sft"]

    spec = read('path: rows.jsonl, map: "my.py:to_messages"').model_dump(mode="json")
    assert spec["data"][0]["map"] == f"{tmp_path}/my.py:to_messages"
    before = spec_hash(spec, seed=0, inputs={})
    code.write_text(CODE.replace("np.int64(3)", "np.int64(4)"))
    assert spec_hash(spec, seed=0, inputs={}) != before
    for data, said in (
        ('path: rows.jsonl, map: "my.py:to_message"', "did you mean 'to_messages'"),
        ("path: rows.jsonl, map: to_messages", "map: "),
        ('world: sft, rows: 3, map: "my.py:text"', "map: has no effect on a synthetic dataset"),
    ):
        with pytest.raises(RecipeError, match=said):
            read(data)
