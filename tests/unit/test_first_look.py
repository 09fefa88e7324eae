"""``align check`` and ``align run`` look at the files that a recipe names before a stage starts."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import align
from align.cli import cli
from align.core.errors import RecipeError
from align.pipeline import first_look as module
from align.pipeline.running import run
from align.pipeline.terminal import Terminal

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
    told = other(str(folder))[1]
    assert "no config.json or adapter_config.json in this folder; expected the folder of a" in told
    assert "no such folder, and not a hub id" in other(str(tmp_path / "gone"))[1]
    code, text = other("ORG/NAME")
    assert code == 0
    assert "models of the hub (ORG/NAME)" in text
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
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


# A stage without a model: it notes its name and writes a manifest.
STAGE = """\
import sys
from pathlib import Path
from align.core.artifacts import spec_hash, write_manifest
from align.recipe.load import read_resolved

_, _, _, resolved, _, name, _, run_dir = sys.argv
recipe = read_resolved(resolved)
spec = recipe.stages[name]
with open("calls.txt", "a") as f:
    f.write(name + "\\n")
hashes = {}
for stage, made in recipe.stages.items():
    inputs = {key: hashes[ref] for key, ref in recipe.inputs(stage).items()}
    hashes[stage] = spec_hash(made.settings(), seed=recipe.seed, inputs=inputs)
write_manifest(Path(run_dir) / name, {
    "kind": spec.produces, "stage": name, "stage_kind": spec.kind, "spec_hash": hashes[name],
    "spec": spec.model_dump(mode="json"), "inputs": {}, "seed": 0, "data": [], "seconds": 1.0,
    "peak_rss_gib": 0.1, "metrics": {},
})
"""
THREE = """\
name: my
stages:
  base: {kind: base, build: {vocab_size: 64}, data: [{world: corpus}], steps: 1}
  sft: {kind: sft, init: base, data: [{path: a.jsonl}]}
  dpo: {kind: dpo, init: sft, data: [{path: pairs.jsonl}]}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).resolve().parents[2]}")
    (tmp_path / "toy_stages.py").write_text(STAGE)
    (tmp_path / "my.yaml").write_text(THREE)
    write(tmp_path / "a.jsonl", ROWS["sft"])
    return tmp_path


def started(**options: object) -> list[str]:
    """Run the recipe; give the stages that were started."""
    Path("calls.txt").write_text("")
    terminal = Terminal(Console(file=io.StringIO()))
    assert run("my.yaml", module="toy_stages", terminal=terminal, **options) == 0
    return Path("calls.txt").read_text().split()


def refused(**options: object) -> list[str]:
    """Return the lines with which the run ends before any stage starts."""
    Path("calls.txt").write_text("")
    with pytest.raises(RecipeError) as error:
        run("my.yaml", module="toy_stages", **options)
    assert error.value.exit_code == 2
    assert Path("calls.txt").read_text() == ""
    assert not list(Path("runs").glob("*/*"))[1:], "only the run's own lock may be there"
    return str(error.value).splitlines()


def test_a_run_lists_the_missing_files_of_all_its_stages_before_the_first(place: Path) -> None:
    Path("a.jsonl").unlink()
    first, second = refused()
    assert first.startswith("my.yaml:4:46: stages.sft.data.0: a.jsonl: no such file")
    assert second.startswith("my.yaml:5:45: stages.dpo.data.0: pairs.jsonl: no such file")
    assert refused(dry=True) == [first, second]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("build: {vocab_size: 64}, data: [{world: corpus}], steps: 1", "path: ./gone", "gone: no"),
        ("steps: 1", "steps: 1, tokenizer: {chat_template: own.jinja}", "'own.jinja' is neither"),
        ("path: a.jsonl", "path: a.jsonl, templates: own.yaml", "own.yaml: the template file"),
        ("path: a.jsonl", "path: a.jsonl, map: 'own.py:rows'", "own.py: no such file"),
        ("path: a.jsonl", "labels: survey", "survey"),
    ],
)
def test_every_kind_of_file_is_looked_at(place: Path, old: str, new: str, told: str) -> None:
    write(place / "pairs.jsonl", ROWS["dpo"])
    Path("my.yaml").write_text(THREE.replace(old, new))
    (line,) = refused()
    assert line.startswith("my.yaml:")
    assert told in line


def test_only_the_stages_that_start_are_looked_at(place: Path) -> None:
    assert started(until="sft") == ["base", "sft"]
    Path("calls.txt").write_text("")
    with pytest.raises(RecipeError, match=r"stages\.dpo\.data\.0"):
        run("my.yaml", module="toy_stages")
    # What is done was read before: its file may be gone.
    Path("a.jsonl").unlink()
    write(place / "pairs.jsonl", ROWS["dpo"])
    assert started() == ["dpo"]


def test_what_an_earlier_stage_writes_need_not_exist(place: Path) -> None:
    Path("my.yaml").write_text(THREE.replace("pairs.jsonl", "runs/my/sft/pairs.jsonl"))
    assert started() == ["base", "sft", "dpo"]
    # In the folder of no stage, it is missing.
    Path("my.yaml").write_text(THREE.replace("pairs.jsonl", "runs/my/other/pairs.jsonl"))
    assert "no such file" in CliRunner().invoke(cli, ["check", "my.yaml"]).exception.args[0]


def test_python_names_the_argument_with_the_missing_file(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.dpo\.data\.0: pairs\.jsonl: no such file"):
        align.run("my.yaml", quiet=True)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("model/model.safetensors").write_bytes(b"weights")
    with pytest.raises(RecipeError, match=r"^data\.0: gone\.jsonl: no such file"):
        align.sft(model="model", data="gone.jsonl", quiet=True)


def test_looking_imports_no_torch(place: Path) -> None:
    code = (
        "import sys\nfrom align.core.errors import RecipeError\n"
        "from align.pipeline.running import run\n"
        "try:\n    run('my.yaml')\nexcept RecipeError as e:\n    print(e)\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "[]"
    assert "pairs.jsonl: no such file" in said.stdout


def in_project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make ``recipes/`` below the current folder; return it."""
    monkeypatch.chdir(folder)
    (folder / "recipes").mkdir()
    return Path("recipes")


def test_a_path_beside_the_recipe_is_named_with_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = in_project(tmp_path, monkeypatch)
    write(folder / "a.jsonl", ROWS["sft"])
    (folder / "t.jinja").write_text("x")
    (folder / "model").mkdir()
    hint = "exists: write ${RECIPE_DIR}/"
    for path in ("a.jsonl", "*.jsonl", "./a.jsonl"):
        spec = f"  it: {{kind: sft, init: base, data: [{{path: '{path}'}}]}}\n"
        code, text = checked(folder, spec)
        assert code != 0
        assert f"recipes/a.jsonl {hint}{path} for it" in text
    _, text = checked(folder, "  it: {kind: base, path: ./model}\n")
    assert f"no such folder, and not a hub id ORG/NAME; recipes/model {hint}./model for it" in text
    _, text = checked(
        folder, "  it: {kind: base, path: O/N, tokenizer: {chat_template: t.jinja}}\n"
    )
    assert f"recipes/t.jinja {hint}t.jinja for it" in text
    # What it says works, from here and from there.
    data = "[{path: '${RECIPE_DIR}/a.jsonl'}]"
    right = f"  it: {{kind: sft, init: base, data: {data}}}\n"
    assert checked(folder, right)[0] == 0
    monkeypatch.chdir(folder)
    assert checked(Path(), right)[0] == 0
    assert "exists: write" not in checked(Path(), stage("sft", Path("b.jsonl")))[1]


def test_two_files_of_one_relative_path_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = in_project(tmp_path, monkeypatch)
    for place in (Path("a.jsonl"), folder / "a.jsonl"):
        write(place, ROWS["sft"])
    code, text = checked(folder, stage("sft", Path("a.jsonl")))
    assert code == 0
    told = "a.jsonl: that of the current folder is read; write ${RECIPE_DIR}/a.jsonl for recipes/a"
    assert told in text
    # One file has two names.
    (folder / "a.jsonl").unlink()
    (folder / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert "is read; write" not in checked(folder, stage("sft", Path("a.jsonl")))[1]


def test_a_folder_beside_the_recipe_that_reads_as_a_hub_id_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = in_project(tmp_path, monkeypatch)
    (folder / "ORG" / "BASE").mkdir(parents=True)
    (folder / "plain").mkdir()
    rows = write(tmp_path / "a.jsonl", ROWS["sft"])
    code, text = checked(folder, stage("sft", rows))
    assert code == 0
    assert (
        "ORG/BASE: it is taken for a hub id; write ${RECIPE_DIR}/ORG/BASE for recipes/ORG/B" in text
    )
    template = "  other: {kind: base, path: O/N, tokenizer: {chat_template: plain}}\n"
    assert "RECIPE_DIR}/plain" not in checked(folder, template + stage("sft", rows))[1]


def test_a_function_in_the_current_folder_is_named_with_its_path_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = in_project(tmp_path, monkeypatch)
    Path("my.py").write_text("def rows(row): return row\n")
    data = write(tmp_path / "a.jsonl", ROWS["sft"])

    def mapped(path: str) -> tuple[int, str]:
        spec = f"    data: [{{path: {data}, map: '{path}:rows'}}]\n"
        return checked(folder, f"  it:\n    kind: sft\n    init: base\n{spec}")

    assert "it is in the current folder: write ../my.py:rows" in mapped("my.py")[1]
    assert mapped("../my.py")[0] == 0
    assert "in the current folder" not in mapped("gone.py")[1]
