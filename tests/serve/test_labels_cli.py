"""``align labels``: import, list and export without a server."""

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import cli
from align.core.errors import DataError, RecipeError
from align.serve.labels.tables import find_project
from align.serve.labels.tasks import Answer, next_task, record_answer
from align.serve.store import Store


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def align(*arguments: str) -> str:
    """Return what a command prints; its error is raised."""
    done = CliRunner().invoke(cli, ["labels", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def pairs_file(count: int) -> str:
    rows = [{"prompt": f"q{i}", "response_a": "x", "response_b": f"y{i}"} for i in range(count)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "pairs.jsonl"


def test_items_are_imported_labeled_and_exported(here: Path):
    options = ("--wanted", "1", "--reason", "wrong", "--reason", "rude", "--seed", "3")
    file = pairs_file(3)
    assert align("import", "helpful", file, *options) == (
        "helpful: 3 items added, 0 were in the project already\n"
    )
    assert "0 items added, 3 were in the project" in align("import", "helpful", file)
    store = Store(here / "runs" / ".serve")
    with store.write() as db:
        project = find_project(db, "helpful")
        assert (project.reasons, project.seed, project.kind) == (("wrong", "rude"), 3, "pairwise")
        for _ in range(2):
            task = next_task(db, project, "ann")
            assert task is not None
            record_answer(db, project, "ann", task=task.id, answer=Answer("left"))
    assert align("list") == (
        "helpful: pairwise, 2 of 3 items labeled, 2 labels by 1 annotators, never exported\n"
    )
    shown = align("export", "helpful")
    (folder,) = (here / "labels" / "helpful").iterdir()
    first, second, third = shown.splitlines()
    assert first.startswith(f"labels/helpful/{folder.name}: items: 2 answered, 0 contested")
    assert first.endswith(hashlib.sha256((folder / "snapshot.json").read_bytes()).hexdigest())
    for line, name, rows in ((second, "preference", 2), (third, "unpaired", 4)):
        digest = hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest()
        assert line == f"  {name}.jsonl: {rows} rows, sha256 {digest}"
    assert f"newest snapshot labels/helpful/{folder.name}" in align("list")


def test_samples_of_a_run_are_imported(here: Path):
    stage = here / "runs" / "r" / "evaluate"
    stage.mkdir(parents=True)
    rows = [
        {"model": m, "prompt": f"q{i}", "completion": f"{m} {i}", "scores": {"r": i * s}}
        for i in range(3)
        for m, s in (("a", 1.0), ("b", -1.0))
    ]
    (stage / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = ("--samples", "r/evaluate:a", "--samples", "r/evaluate:b")
    assert "3 items added" in align("import", "p", *sides, "--by", "r", "--queue", "margin")
    with Store(here / "runs" / ".serve").write() as db:
        task = next_task(db, find_project(db, "p"), "ann")
    assert task is not None
    assert task.prompt == "q0", "its margin is 0, those of the others 2 and 4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("import", "p"), "give a FILE, or --samples once or twice"),
        (("import", "p", "f.jsonl", "--samples", "r/e"), "give a FILE, or --samples"),
        (("import", "p", "f.jsonl", "--by", "r"), "--by has no effect on a file"),
        (("import", "p", "--samples", "r/e", "--gold"), "--gold needs a FILE"),
        (("import", "p", "--samples", "r/e"), "r/e: no samples.jsonl in runs/r/e"),
        (("import", "p", "missing.jsonl"), "no such file"),
        (("import", "../p", "pairs.jsonl"), "expected a name of 1 to 64"),
        (("import", "old", "pairs.jsonl", "--wanted", "3"), "keeps its settings. Leave out --want"),
        (("export", "new"), "no project 'new'; there are: old"),
        (("export", "old"), "nothing to export"),
        (("list", "--runs", "elsewhere"), "elsewhere: no labeling project in it"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(
    here: Path, arguments: tuple[str, ...], message: str
):
    align("import", "old", pairs_file(1))
    with pytest.raises((DataError, RecipeError)) as caught:
        align(*arguments)
    assert message in str(caught.value)
    assert not (here / "elsewhere").exists()
    assert align("list").startswith("old: pairwise, 0 of 1"), "nothing else was written"
