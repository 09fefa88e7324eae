"""``align check --deep`` on the recipes of the project, and on a run that is half done."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def deep(recipe: Path, runs: Path, *words: str) -> tuple[int, str]:
    """Run the deep check by the command line; give the exit code and all that was written."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "align.cli",
            "check",
            str(recipe),
            "--deep",
            "--runs",
            str(runs),
            *words,
        ],
        cwd=ROOT,
        env=stage_runs.environment() | {"PYTHONPATH": str(ROOT)},
        timeout=1200,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def needs_real_data(recipe: Path) -> bool:
    return "ALIGN_REAL_DATA" in recipe.read_text()


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=[pytest.mark.real] if needs_real_data(r) else []) for r in RECIPES],
    ids=lambda r: r.stem,
)
@pytest.mark.slow
def test_every_recipe_passes_its_own_deep_check(recipe: Path, tmp_path: Path) -> None:
    # Before anything is trained: what a base stage brings in by path and the stages on top of it
    # are checked, all others must say that they are not.
    code, said = deep(recipe, tmp_path)
    assert code == 0, said
    assert " fail " not in said
    checked, _, waiting = said.splitlines()[-1].partition("; not checkable yet: ")
    assert " stages checked" in checked
    assert not checked.startswith("0 ")
    for stage in filter(None, waiting.split(", ")):
        assert f"{stage} (" in said
    assert not (tmp_path / recipe.stem).exists()


@pytest.mark.slow
def test_stages_are_checked_as_far_as_the_run_has_come(tmp_path: Path) -> None:
    recipe = stage_runs.write_recipe(tmp_path)
    stage_runs.finish(recipe, "base", tmp_path / "runs" / "tiny")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}
    code, said = deep(recipe, tmp_path / "runs")
    assert code == 0, said
    assert said.splitlines()[-1] == "6 of 6 stages checked"
    for name in ("trained tokens", "first loss", "sampler", "greedy", "ratio", "reference"):
        assert f"ok       {name}" in said
    # ln 2 to six digits, by the dpo stage's own loss.
    assert "0.693147" in said
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*")}
    # A reward that nothing can satisfy, and a column that is not there.
    hopeless = "stages.ppo.rewards=[{kind: exact_match, pattern: 'q(zz)q'}]"
    code, said = deep(recipe, tmp_path / "runs", "--only", "ppo", "--set", hopeless)
    assert code == 2, said
    assert "the value of column 'answer' never scores above a wrong value" in said
    missing = "stages.ppo.rewards=[{kind: math, column: solution}]"
    code, said = deep(recipe, tmp_path / "runs", "--only", "ppo", "--set", missing)
    assert code == 2, said
    assert "no column 'solution'" in said


def test_deep_check_of_an_unknown_stage_names_the_stages(tmp_path: Path) -> None:
    code, said = deep(stage_runs.write_recipe(tmp_path), tmp_path, "--only", "pppo")
    assert code == 2
    assert "no stage 'pppo'; stages are base, sft, dpo, reward, ppo, grpo; did you mean" in said
