"""`align run` and its stages remove and write to nothing that the suite did not make."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from align.core import checkpoints, lock
from align.core.errors import AlignError, ArtifactError, Preempted, RecipeError
from align.core.identity import check_is_stage_folder
from align.core.lock import SILENT_S, StageLock, _here, refuse_if_held, started_at
from align.pipeline.running import run
from align.recipe.load import load_recipe

RECIPE = "name: {name}\nstages: {{{stage}: {{kind: curate, data: [{{path: d.jsonl}}], of: sft}}}}\n"


def write_recipe(name: str, stage: str = "data") -> Path:
    path = Path("r.yaml")
    path.write_text(RECIPE.format(name=name, stage=stage))
    Path("d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return path


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project folder whose `data/` nobody wants to lose."""
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "data" / "precious.txt").write_text("years of work")
    monkeypatch.chdir(project)


@pytest.mark.parametrize("name", [".", "..", "...", "-x", ".hidden", "a/b", "'a b'", "'..\\n'"])
def test_names_that_are_no_plain_folder_name_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="name: found"):
        load_recipe(write_recipe(name))


@pytest.mark.parametrize("stage", [".", "..", "a/b", "-rf", "a.b", '"data\\n"'])
def test_stage_names_that_are_no_plain_folder_name_are_refused(stage: str) -> None:
    with pytest.raises(RecipeError, match="a stage name is also a folder name"):
        load_recipe(write_recipe("x", stage))


@pytest.mark.parametrize("force", [False, True])
def test_a_run_folder_that_is_a_project_loses_nothing(force: bool) -> None:
    recipe = write_recipe("project")
    with pytest.raises(AlignError, match=r"data: exists, but no stage of align wrote it") as told:
        run(recipe, run_dir=Path("../project"), force=force, only="data" if force else None)
    assert told.value.exit_code == 2
    assert Path("data/precious.txt").read_text() == "years of work"


def test_an_old_folder_that_is_not_a_stages_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x" / "data"
    folder.mkdir(parents=True)
    (folder / "begun.json").write_text('{"spec_hash": "0"}')
    (folder / "manifest.json").write_text('{"spec_hash": "0", "kind": "data", "files": {}}')
    foreign = folder.with_name("data.old")
    foreign.mkdir()
    (foreign / "precious.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"data\.old: exists, but no stage"):
        run(write_recipe("x"), run_dir=folder.parent, force=True, only="data")
    assert (foreign / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "files",
    [
        {"recipe.yaml": "stages: {data: {}}"},
        {"begun.json": "[]"},
        {"begun.json": "{}", "thesis.tex": ""},
        {"manifest.json": '{"name": "a web app", "files": []}'},
        {"log.txt": "", "thesis.tex": ""},
    ],
)
def test_files_of_others_that_have_our_names_do_not_make_a_folder_ours(
    tmp_path: Path, files: dict[str, str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ArtifactError):
        check_is_stage_folder(folder)


def test_a_linked_folder_is_not_followed(tmp_path: Path) -> None:
    link = tmp_path / "stage"
    link.symlink_to(Path("data").resolve())
    with pytest.raises(ArtifactError):
        check_is_stage_folder(link)


def test_runs_that_is_a_file_is_one_line() -> None:
    Path("runs").write_text("")
    with pytest.raises(ArtifactError, match="--runs") as told:
        run(write_recipe("x"), run_dir=Path("runs/x"))
    assert "\n" not in str(told.value)


def test_a_stages_lock_refuses_a_second_holder_and_is_free_after_release(tmp_path: Path) -> None:
    lock = StageLock(tmp_path)
    with pytest.raises(ArtifactError, match=f"process {os.getpid()} on ") as told:
        StageLock(tmp_path)
    assert told.value.exit_code == 2
    lock.release()
    refuse_if_held(tmp_path)
    assert not list(tmp_path.glob("stage.lock*"))


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path;"
        "from align.core.lock import StageLock;"
        "StageLock(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / "stage.lock").exists()
    StageLock(tmp_path).release()


def test_what_killed_starters_left_beside_the_lock_is_removed(tmp_path: Path) -> None:
    """A starter may be killed while it reads the clock, or looks at the lock of a dead holder."""
    dead = {"host": "h", "place": _here(), "pid": 4194303, "started": "1"}
    (tmp_path / "stage.lock.now.host.1.2.tmp").touch()
    (tmp_path / "stage.lock.host.1.tmp").write_text(json.dumps(dead))
    held = tmp_path / "stage.lock.host.2.tmp"
    alive = {"place": _here(), "pid": os.getpid(), "started": started_at(os.getpid())}
    held.write_text(json.dumps(alive))  # another starter will put it back
    other = tmp_path / "metrics.jsonl.tmp"
    other.touch()
    lock = StageLock(tmp_path)
    assert sorted(tmp_path.glob("*.tmp")) == [other, held]
    lock.release()


def test_a_process_id_that_was_given_to_another_process_holds_nothing(tmp_path: Path) -> None:
    lock = StageLock(tmp_path)
    holder = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps({**holder, "started": "1"}))
    StageLock(tmp_path).release()


def test_a_holder_of_another_machine_counts_until_it_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "stage.lock"
    path.write_text(json.dumps({"host": "node7", "place": "elsewhere", "pid": 1, "started": "1"}))
    with pytest.raises(ArtifactError, match="process 1 on node7"):
        StageLock(tmp_path)
    long_ago = path.stat().st_mtime - SILENT_S - 1
    os.utime(path, (long_ago, long_ago))
    StageLock(tmp_path).release()


ELSEWHERE = json.dumps({"host": "node7", "place": "elsewhere", "pid": 9, "started": "1"})


def test_a_run_on_another_machine_is_refused_after_its_next_sign_of_life() -> None:
    path = Path("runs/x/run.lock")
    path.parent.mkdir(parents=True)
    path.write_text(ELSEWHERE)
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # the holder touches its lock

    lock.wait_for_sign(path, tell)
    assert len(said) == 1
    assert "waiting for its next sign of life" in said[0]
    with pytest.raises(
        ArtifactError, match=r"process 9 on node7 is running this run\. That"
    ) as told:
        lock.StageLock(path.parent, lock.RUN_LOCK)
    assert "remove the file" in str(told.value)
    assert path.read_text() == ELSEWHERE


def test_a_run_takes_over_from_a_machine_that_stays_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SILENT_S", 0.5)
    monkeypatch.setattr(lock, "SIGN_EVERY_S", 0.01)
    path = tmp_path / lock.RUN_LOCK
    path.write_text(ELSEWHERE)
    lock.wait_for_sign(path, lambda _: None)
    held = lock.StageLock(tmp_path, lock.RUN_LOCK)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    # Its own machine's holders are known at once.
    lock.wait_for_sign(path, lambda text: pytest.fail(text))
    held.release()
    assert not list(tmp_path.glob("run.lock*"))


def test_a_signal_ends_the_wait_for_another_machine(tmp_path: Path) -> None:
    path = tmp_path / lock.RUN_LOCK
    path.write_text(ELSEWHERE)
    with pytest.raises(Preempted, match="stopped by a signal before this folder was free"):
        lock.wait_for_sign(path, lambda _: None, lambda: 1)
    assert path.read_text() == ELSEWHERE


def test_a_lock_that_cannot_be_written_refuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        lock.StageLock(tmp_path)
    assert not list(tmp_path.glob("stage.lock*"))


def test_a_holder_that_was_taken_for_dead_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspended machine, or one without its file system for long, goes on after its successor."""
    monkeypatch.setattr(lock, "TOUCH_S", 0.01)
    stage = tmp_path / "sft"
    stage.mkdir()
    held = lock.StageLock(stage)
    toucher = next(t for t in threading.enumerate() if t.name == f"lock of {stage}")
    save = partial(checkpoints.save_checkpoint, stage / "checkpoints", engines={}, state={}, keep=2)
    first = save(1)
    path = stage / "stage.lock"
    other = {"host": "node7", "place": "elsewhere", "pid": 9, "started": "1"}
    path.write_text(json.dumps(other))
    with pytest.raises(ArtifactError, match="process 9 on node7 has taken over this stage"):
        save(2)
    with pytest.raises(ArtifactError, match="taken over"):
        checkpoints.save_weights(lambda: None, {}, stage)
    assert list((stage / "checkpoints").iterdir()) == [first]
    # It does not keep the other's lock from becoming stale, nor remove it.
    toucher.join(timeout=120)
    assert not toucher.is_alive()
    held.release()
    assert json.loads(path.read_text()) == other
    # A process that never had this lock, such as a tool or the next stage, is not concerned.
    save(2)


def test_a_run_does_not_touch_a_stage_that_another_process_runs(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x" / "data"
    folder.mkdir(parents=True)
    (folder / "begun.json").write_text('{"spec_hash": "0"}')
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    lock = StageLock(folder)
    with pytest.raises(ArtifactError, match="is running this stage"):
        run(write_recipe("x"), run_dir=folder.parent, force=True, only="data")
    assert (folder / "checkpoints" / "step-00000001").is_dir()
    lock.release()


def test_started_at_knows_the_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert started_at(child.pid) is None
    assert started_at(os.getpid()) is not None
