"""A killed stage that is run again ends with the bytes of one that was never interrupted."""

import logging
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

from align.core.checkpoints import STATE, newest_checkpoint
from align.core.errors import EXIT_PREEMPTED, EXIT_USER


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the recipe once."""
    return runs.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run base, sft and ppo without interruption."""
    run_dir = tmp_path_factory.mktemp("whole")
    for stage in ("base", "sft", "ppo"):
        runs.finish(recipe, stage, run_dir)
    return run_dir


def begin(whole: Path, folder: Path) -> Path:
    """Give a run folder that holds the same base and nothing else."""
    shutil.copytree(whole / "base", folder / "base")
    return folder


def assert_same(found: Path, expected: Path, stage: str) -> None:
    assert runs.weights(found, stage) == runs.weights(expected, stage)
    assert runs.numbers(found, stage) == runs.numbers(expected, stage)


def test_sft_killed_in_the_middle_ends_with_the_same_bytes(recipe, whole, tmp_path) -> None:
    run_dir = begin(whole, tmp_path)
    code, _ = runs.interrupt(recipe, "sft", run_dir, signal.SIGKILL, runs.half_of(9))
    assert code == -signal.SIGKILL
    assert not (run_dir / "sft" / "manifest.json").exists()
    # Steps after the checkpoint were done and logged before the kill, or a line was half written.
    with (run_dir / "sft" / "metrics.jsonl").open("a") as f:
        f.write('{"step": 23, "train/lo')
    assert "resumed from" in runs.finish(recipe, "sft", run_dir)
    assert_same(run_dir, whole, "sft")
    card = "sft/model/README.md"  # it follows from the manifest alone
    assert (run_dir / card).read_bytes() == (whole / card).read_bytes()


def test_ppo_killed_in_the_middle_ends_with_the_same_bytes(recipe, whole, tmp_path) -> None:
    run_dir = begin(whole, tmp_path)
    code, _ = runs.interrupt(recipe, "ppo", run_dir, signal.SIGKILL, runs.half_of(9))
    assert code == -signal.SIGKILL
    assert "resumed from" in runs.finish(recipe, "ppo", run_dir)
    assert_same(run_dir, whole, "ppo")
    assert runs.samples(run_dir, "ppo") == runs.samples(whole, "ppo")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_sigterm_saves_a_checkpoint_and_goes_on_from_it(recipe, whole, tmp_path, stage) -> None:
    run_dir = begin(whole, tmp_path)
    options = {"overrides": [f"stages.{stage}.checkpoint_every=0"]}
    code, said = runs.interrupt(recipe, stage, run_dir, signal.SIGTERM, "metrics.jsonl", **options)
    assert code == EXIT_PREEMPTED, said[-2000:]
    saved = sorted(p.name for p in (run_dir / stage / "checkpoints").iterdir())
    assert len(saved) == 1, saved
    lines = runs.numbers(run_dir, stage)
    assert saved == [f"step-{lines[-1]['step']:08d}"]
    assert "resumed from" in runs.finish(recipe, stage, run_dir, **options)
    assert_same(run_dir, whole, stage)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


DAMAGES = {
    "flip": lambda path: flip(path / "policy" / "mp_rank_00_model_states.pt"),
    "truncate": lambda path: truncate(path / "rng-0.pt"),
    "delete": lambda path: (path / "policy" / "mp_rank_00_model_states.pt").unlink(),
    "no_record": lambda path: (path / STATE).unlink(),
    "record": lambda path: truncate(path / STATE),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_checkpoint_names_a_damaged_one_and_takes_the_one_before(
    whole, tmp_path, damage, caplog, monkeypatch
) -> None:
    # setup_logging, called by another test of this process, cuts the way to the root logger.
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)
    folder = tmp_path / "checkpoints"
    shutil.copytree(whole / "sft" / "checkpoints", folder)
    assert newest_checkpoint(folder) == folder / "step-00000024"
    DAMAGES[damage](folder / "step-00000024")
    assert newest_checkpoint(folder) == folder / "step-00000021"
    assert "step-00000024: damaged" in caplog.text


def test_damaged_checkpoint_falls_back_and_still_ends_with_the_same_bytes(
    recipe, whole, tmp_path
) -> None:
    run_dir = begin(whole, tmp_path)
    shutil.copytree(whole / "sft", run_dir / "sft")
    (run_dir / "sft" / "manifest.json").unlink()
    (run_dir / "sft" / "model" / "model.safetensors").unlink()
    flip(
        run_dir / "sft" / "checkpoints" / "step-00000024" / "policy" / "mp_rank_00_model_states.pt"
    )
    said = runs.finish(recipe, "sft", run_dir)
    assert "step-00000024: damaged" in said
    assert "resumed from" in said
    assert "step-00000021" in said
    assert_same(run_dir, whole, "sft")


def test_stage_killed_after_its_last_step_keeps_its_final_numbers(recipe, whole, tmp_path) -> None:
    run_dir = begin(whole, tmp_path)
    shutil.copytree(whole / "sft", run_dir / "sft")
    manifest = runs.manifest(run_dir, "sft")
    (run_dir / "sft" / "manifest.json").unlink()
    runs.finish(recipe, "sft", run_dir)
    again = runs.manifest(run_dir, "sft")
    assert again["metrics"].pop("tokens/per_s") >= 0
    manifest["metrics"].pop("tokens/per_s")
    assert again["metrics"] == manifest["metrics"]
    assert_same(run_dir, whole, "sft")


@pytest.mark.slow
def test_two_ranks_killed_after_their_last_step_end_with_the_same_bytes(
    recipe, whole, tmp_path
) -> None:
    """The merged weights are compared with the last held-out loss, on every rank."""
    run_dir = begin(whole, tmp_path)
    changed = ("ranks=2", "steps=3", "tuning={method: lora, rank: 4, alpha: 8}")
    options = {"ranks": 2, "overrides": [f"stages.sft.{x}" for x in changed]}
    runs.finish(recipe, "sft", run_dir, **options)
    before, expected = runs.weights(run_dir, "sft"), runs.manifest(run_dir, "sft")["metrics"]
    (run_dir / "sft" / "manifest.json").unlink()
    assert "resumed from" in runs.finish(recipe, "sft", run_dir, **options)
    assert runs.weights(run_dir, "sft") == before
    again = runs.manifest(run_dir, "sft")["metrics"]
    assert {k: v for k, v in again.items() if k != "tokens/per_s"} == {
        k: v for k, v in expected.items() if k != "tokens/per_s"
    }


def test_resuming_with_other_settings_is_refused_and_force_begins_anew(
    recipe, whole, tmp_path
) -> None:
    run_dir = begin(whole, tmp_path)
    shutil.copytree(whole / "sft", run_dir / "sft")
    (run_dir / "sft" / "manifest.json").unlink()
    changed = {"overrides": ["stages.sft.steps=2"]}
    code, said = runs.run(recipe, "sft", run_dir, **changed)
    assert code == EXIT_USER
    assert "--force" in said
    said = runs.finish(recipe, "sft", run_dir, **changed, flags=["--force"])
    assert "resumed from" not in said
    assert [line["step"] for line in runs.numbers(run_dir, "sft")] == [0, 1, 2]


@pytest.mark.slow
def test_ppo_on_vllm_killed_in_the_middle_ends_with_the_same_bytes(recipe, whole, tmp_path) -> None:
    pytest.importorskip("vllm")
    options = {"overrides": ["stages.ppo.sampling.engine=vllm", "stages.ppo.steps=8"]}
    straight, broken = begin(whole, tmp_path / "a"), begin(whole, tmp_path / "b")
    said = runs.finish(recipe, "ppo", straight, **options)
    # vLLM logs tracebacks and failures of kernels that it then does without.
    assert not re.search(r"Traceback|\bERROR\b|[Ff]ailed to", said), said
    code, _ = runs.interrupt(recipe, "ppo", broken, signal.SIGKILL, runs.half_of(6), **options)
    assert code == -signal.SIGKILL
    assert "resumed from" in runs.finish(recipe, "ppo", broken, **options)
    assert_same(broken, straight, "ppo")
    assert runs.samples(broken, "ppo") == runs.samples(straight, "ppo")
