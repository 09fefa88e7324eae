"""Plan, skip, resume, force, exit codes and signals, with small real stage scripts."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from align.api.running import execute
from align.core.errors import RecipeError
from align.pipeline.planning import plan
from align.pipeline.running import run
from align.pipeline.terminal import Terminal
from align.recipe.load import load_recipe, read_resolved

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
name: toy
seed: 1
stages:
  base: {kind: base, build: {vocab_size: 64}, data: [{world: corpus}], steps: 1}
  sft: {kind: sft, init: base, data: [{world: sft}]}
  dpo: {kind: dpo, init: sft, data: [{world: preference}]}
"""
# What a stage does, without a model: note the call, obey the files that a test puts beside it.
STAGE = """\
import argparse, json, os, signal, sys
from pathlib import Path
from align.core.artifacts import read_manifest, spec_hash, write_manifest
from align.recipe.load import read_resolved

parser = argparse.ArgumentParser()
parser.add_argument("kind")
for name in ("--resolved", "--stage", "--run-dir"):
    parser.add_argument(name, required=True)
args = parser.parse_args()
recipe = read_resolved(args.resolved)
spec, run_dir = recipe.stages[args.stage], Path(args.run_dir)
out = run_dir / args.stage
with open("calls.txt", "a") as f:
    f.write(args.stage + "\\n")
if Path("edit").exists():
    Path("r.yaml").write_text("not a recipe")
Path(f"{args.stage}.env").write_text(json.dumps(dict(os.environ)))
if Path(f"{args.stage}.wait").exists():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with (out / "metrics.jsonl").open("w") as f:
        f.write(json.dumps({"step": 1, "time_s": 1.0, "total_steps": 4, "train/loss": 2.5}) + "\\n")
    signal.sigwait({signal.SIGTERM})
    sys.exit(75)
if Path(f"{args.stage}.exit").exists():
    print("the reason of the failure")
    code = int(Path(f"{args.stage}.exit").read_text())
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
hashes = {k: read_manifest(run_dir / v)["spec_hash"] for k, v in recipe.inputs(args.stage).items()}
plain = spec.model_dump(mode="json")
write_manifest(out, {
    "kind": spec.produces, "stage": args.stage, "stage_kind": spec.kind, "spec": plain,
    "spec_hash": spec_hash(spec.settings(), seed=recipe.seed, inputs=hashes),
    "inputs": {k: {"spec_hash": h} for k, h in hashes.items()},
    "seed": recipe.seed, "data": [], "seconds": 1.0, "peak_rss_gib": 0.1, "metrics": {},
})
"""


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    Path("r.yaml").write_text(RECIPE)
    Path("toy_stages.py").write_text(STAGE)


def start(**options: object) -> tuple[int, list[str], str]:
    """Run the recipe; give the exit code, the stages that were started, and what was shown."""
    Path("calls.txt").write_text("")
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=200, soft_wrap=True))
    code = run("r.yaml", module="toy_stages", terminal=terminal, **options)
    return code, Path("calls.txt").read_text().split(), shown.getvalue()


def states(recipe: str = "r.yaml", *overrides: str) -> list[str]:
    return [stage.status for stage in plan(load_recipe(recipe, overrides), "runs/toy")]


def reasons(*overrides: str) -> list[str]:
    return [stage.reason for stage in plan(load_recipe("r.yaml", overrides), "runs/toy")]


def start_up_to_sft() -> None:
    assert start(only="base")[:2] == (0, ["base"])
    assert start(only="sft")[:2] == (0, ["sft"])


def test_plan_of_an_empty_run_is_all_to_do():
    assert states() == ["to do"] * 3


def test_run_skips_what_is_done_and_names_what_is_missing():
    start_up_to_sft()
    assert states() == ["done", "done", "to do"]
    code, calls, shown = start(only="sft")
    assert (code, calls) == (0, [])
    assert "[2/3] sft: done already" in shown
    assert "not run yet: dpo" in shown


def test_a_run_ends_with_the_line_that_serves_its_last_policy():
    code, _, shown = start()
    assert code == 0
    (line,) = [line for line in shown.splitlines() if line.startswith("serve: ")]
    # The beginning depends on the installed vLLM.
    assert re.fullmatch(
        r"serve: (vllm serve|python -m vllm\S+ --model) runs/toy/dpo/model "
        "--served-model-name toy-dpo",
        line,
    )
    # Without its adapter, the folder of such a stage is another model.
    adapted = "stages.dpo.tuning.method=bottleneck"
    assert "serve:" not in start(overrides=[adapted], force=True)[2]


def test_changed_stage_is_an_error_and_its_dependants_are_changed_too():
    start_up_to_sft()
    changed = "stages.base.steps=2"
    assert states("r.yaml", changed) == ["changed", "changed", "to do"]
    assert reasons(changed)[:2] == ["steps 1 -> 2", "its input base changed"]
    with pytest.raises(
        RecipeError, match=r"base: changed since it ran: steps 1 -> 2[\s\S]*--force"
    ):
        start(overrides=[changed])
    assert states() == ["done", "done", "to do"]


def test_change_of_a_later_stage_leaves_the_earlier_done():
    start_up_to_sft()
    assert states("r.yaml", "stages.sft.optim.learning_rate=1e-4") == ["done", "changed", "to do"]
    assert states("r.yaml", "seed=2") == ["changed", "changed", "to do"]
    assert reasons("seed=2")[0] == "seed 1 -> 2"


def test_force_runs_the_changed_stage_and_what_depends_on_it():
    start_up_to_sft()
    changed = ["stages.base.steps=2"]
    Path("dpo.exit").write_text("1")
    code, calls, _ = start(overrides=changed, force=True)
    assert (code, calls) == (1, ["base", "sft", "dpo"])
    assert states("r.yaml", *changed) == ["done", "done", "half-done"]
    assert not Path("runs/toy/base.old").exists()


def test_force_with_a_name_runs_an_unchanged_stage_again():
    start_up_to_sft()
    assert start(only="base", force=True)[:2] == (0, ["base"])
    Path("r.yaml").write_text(RECIPE.rpartition("  dpo")[0])
    with pytest.raises(RecipeError, match=r"no stage changed\. Select one with --only"):
        start(force=True)
    # In Python the finished run is what the caller asks for.
    again = execute(
        load_recipe("r.yaml"), Path("runs/toy"), quiet=True, force=True, module="toy_stages"
    )
    assert [stage.status for stage in again.stages.values()][:2] == ["done", "done"]
    assert Path("calls.txt").read_text() == ""
    # What a command redoes by itself is redone, with what depends on it, and only when forced.
    assert start(redo=("sft",))[:2] == (0, [])
    assert start(redo=("sft",), force=True)[:2] == (0, ["sft"])
    assert start(redo=("base",), force=True)[:2] == (0, ["base", "sft"])
    assert start(redo=("sft",), force=True, until="base", only=None, from_="base")[1] == ["base"]


def test_force_keeps_the_old_artifact_until_the_new_one_is_complete():
    start_up_to_sft()
    before = Path("runs/toy/sft/manifest.json").read_bytes()
    Path("sft.exit").write_text("1")
    assert start(only="sft", force=True)[0] == 1
    assert Path("runs/toy/sft.old/manifest.json").read_bytes() == before
    Path("sft.exit").unlink()
    assert start(only="sft")[:2] == (0, ["sft"])
    assert not Path("runs/toy/sft.old").exists()


def test_only_takes_several_stages_and_until_ends_a_run():
    code, calls, shown = start(only="sft, base")
    assert (code, calls) == (0, ["base", "sft"])
    assert "to do: base, sft; left out: dpo" in shown.splitlines()
    with pytest.raises(RecipeError, match="--only cannot be combined with --from or --until"):
        start(only="sft", until="sft")
    with pytest.raises(RecipeError, match="--from sft comes after --until base"):
        start(from_="sft", until="base")
    assert start(until="sft", from_="sft", force=True)[:2] == (0, ["sft"])
    assert start(only="base,sft", force=True)[:2] == (0, ["base", "sft"])
    assert states() == ["done", "done", "to do"]


def test_a_dry_run_shows_each_action_and_refuses_as_the_run_does():
    start_up_to_sft()
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")}
    code, calls, shown = start(dry=True, from_="sft", force=True)
    assert (code, calls) == (0, [])
    lines = [line.split("(")[0].split() for line in shown.splitlines()[1:]]
    assert lines == [
        ["base", "base", "left", "out"],
        ["sft", "sft", "run", "again"],
        ["dpo", "dpo", "run", "again"],
    ]
    assert "keep" in start(dry=True)[2]
    with pytest.raises(RecipeError, match="changed since it ran"):
        start(dry=True, overrides=["base.steps=2"])
    assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*")} == before


def test_from_leaves_out_earlier_stages_and_wants_their_results():
    with pytest.raises(RecipeError, match=r"stages\.sft\.init: needs 'base', which is not done"):
        start(from_="sft")
    with pytest.raises(RecipeError, match=r"no stage 'sfft'.*did you mean 'sft'"):
        start(only="sfft")
    start_up_to_sft()
    Path("dpo.exit").write_text("1")
    assert start(from_="sft")[:2] == (1, ["dpo"])


@pytest.mark.parametrize(("stage_code", "code"), [(1, 1), (2, 2), (75, 75), (3, 1), (-9, 1)])
def test_exit_code_of_a_failed_stage_is_passed_on(stage_code: int, code: int):
    Path("base.exit").write_text(str(stage_code))
    got, calls, shown = start()
    assert (got, calls) == (code, ["base"])
    assert states()[0] == "half-done"
    if code != 75:
        assert "the reason of the failure" in shown
    if stage_code == -9:
        assert "killed by SIGKILL" in shown


def test_exit_0_without_a_manifest_is_a_failure():
    Path("toy_stages.py").write_text("pass\n")
    assert start()[0] == 1


def test_half_done_stage_with_other_settings_is_changed_if_it_has_a_checkpoint():
    Path("base.exit").write_text("1")
    start()
    changed = "stages.base.steps=2"
    assert states("r.yaml", changed)[0] == "to do"
    Path("runs/toy/base/checkpoints/step-1").mkdir(parents=True)
    assert states()[0] == "half-done"
    assert states("r.yaml", changed)[0] == "changed"
    assert reasons(changed)[0] == "started with steps 1 -> 2"


def test_a_try_that_left_nothing_is_cleared_away_before_the_next():
    Path("base.exit").write_text("1")
    start()
    Path("runs/toy/base/stale.txt").write_text("")
    Path("base.exit").unlink()
    assert start(only="base", overrides=["stages.base.steps=2"])[0] == 0
    assert not Path("runs/toy/base/stale.txt").exists()


def test_data_that_changed_since_makes_the_stage_changed():
    start(only="base")
    path = Path("runs/toy/base/manifest.json")
    Path("rows.jsonl").write_text("{}\n")
    # sha256 of another content than the file's
    manifest = json.loads(path.read_text()) | {"data": [{"path": "rows.jsonl", "sha256": "0" * 64}]}
    path.write_text(json.dumps(manifest))
    assert reasons()[0] == "the data in rows.jsonl changed since"


def test_threads_follow_the_recipe_and_the_stage_hears_of_overrides():
    assert start(only="base", overrides=["stages.base.threads=3", "stages.base.steps=5"])[0] == 0
    env = json.loads(Path("base.env").read_text())
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    manifest = json.loads(Path("runs/toy/base/manifest.json").read_text())
    assert manifest["spec"]["steps"] == 5


def test_sigterm_reaches_the_stage_and_its_code_75_comes_back():
    Path("base.wait").write_text("")
    code = (
        "import sys; from align.pipeline.running import run; "
        "sys.exit(run('r.yaml', module='toy_stages'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    metrics = Path("runs/toy/base/metrics.jsonl")
    while not metrics.exists() and process.poll() is None:
        os.sched_yield()
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 75, shown
    assert "a checkpoint was saved. Run the same command again to resume" in shown
    Path("base.wait").unlink()
    assert start(only="base")[:2] == (0, ["base"])


def test_seconds_of_a_resumed_stage_add_up_and_those_of_a_redone_one_do_not():
    timings = Path("runs/toy/timings.json")
    Path("base.exit").write_text("75")
    start()
    # An hour before the interruption.
    timings.write_text('{"base": 3600.0}')
    Path("base.exit").unlink()
    start(only="base")
    assert json.loads(timings.read_text())["base"] > 3600
    start(only="base", force=True)
    assert 0 < json.loads(timings.read_text())["base"] < 3600


def test_two_runs_in_one_folder_are_refused():
    import fcntl

    Path("runs/toy").mkdir(parents=True)
    with Path("runs/toy/.lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(RecipeError, match="another 'align run' is using this folder"):
            start()


def test_last_stage_writes_the_summary_with_the_cost_of_each_stage():
    Path("r.yaml").write_text(RECIPE.rpartition("  dpo")[0])
    code, calls, _ = start()
    assert (code, calls) == (0, ["base", "sft"])
    summary = json.loads(Path("runs/toy/summary.json").read_text())
    timings = json.loads(Path("runs/toy/timings.json").read_text())
    assert summary["stages"]["sft"] == {
        "seconds": timings["sft"],
        "peak_rss_gib": 0.1,
        "tokens_per_s": None,
    }
    assert summary["seconds"] == pytest.approx(timings["base"] + timings["sft"], abs=0.01)
    assert Path("runs/toy/report.html").is_file()


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1)])
def test_expectation_that_does_not_hold_is_exit_code_1(holds: bool, code: int):
    Path("r.yaml").write_text(RECIPE.rpartition("  dpo")[0])
    assert start()[0] == 0
    entry = {"key": "seconds", "band": [0, 1], "value": 2.0, "holds": holds}
    evaluation = {"tasks": {}, "expectations": [entry]}
    Path("runs/toy/sft/summary.json").write_text(json.dumps(evaluation))
    assert start()[:2] == (code, [])


def test_the_recipe_is_read_once_whatever_happens_to_the_file():
    Path("edit").write_text("")
    overrides = ["stages.dpo.beta=0.3"]
    assert start(only="base", overrides=overrides)[0] == 0
    assert Path("r.yaml").read_text() == "not a recipe"
    Path("r.yaml").write_text(RECIPE)
    code, calls, _ = start(from_="sft", overrides=overrides)
    # The file was broken as sft began; dpo still got what was read, the override with it.
    assert calls == ["sft", "dpo"], code
    manifest = json.loads(Path("runs/toy/dpo/manifest.json").read_text())
    assert manifest["spec"]["beta"] == 0.3
    Path("r.yaml").write_text(RECIPE)
    written = read_resolved("runs/toy/dpo/recipe.yaml")
    assert written == load_recipe("r.yaml", overrides)


def test_grace_of_the_command_line_reaches_the_run(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from align.cli import cli
    from align.pipeline import running

    given = []
    monkeypatch.setattr(running, "run", lambda *_, **options: given.append(options) or 0)
    for words in ([], ["--grace", "600"]):
        assert CliRunner().invoke(cli, ["run", "r.yaml", *words]).exit_code == 0
    assert [options["grace_s"] for options in given] == [120.0, 600.0]
    assert CliRunner().invoke(cli, ["run", "r.yaml", "--grace", "0"]).exit_code == 2
