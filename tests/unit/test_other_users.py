"""What this user may not read of a run is not called damaged, and nothing asks to redo it."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.core.artifacts import find_damage, has_manifest, read_manifest, write_manifest
from align.core.storage import storage_problem

NOBODY = 65534


@pytest.fixture
def stage() -> Iterator[Path]:
    """Yield a finished stage in a folder that any user may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "base"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "weights").write_text("x")
        write_manifest(folder, {"kind": "policy"})
        yield folder
        folder.chmod(0o755)


def as_another_user(act: Callable[[], object]) -> str:
    """Return the error of a function in a process of a user whom permissions bind."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            said = repr(act())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as told:
        return told.read()


def test_folder_of_another_user_is_named_and_its_stage_is_not_called_unfinished(
    stage: Path,
) -> None:
    stage.chmod(0)
    for act in (has_manifest, read_manifest):
        said = as_another_user(lambda act=act: act(stage))
        assert said.startswith(f"UnreadableError: {stage}")
        assert "may not read it" in said


@pytest.mark.parametrize("name", ["manifest.json", "model/weights"])
def test_file_of_another_user_is_not_called_damaged(stage: Path, name: str) -> None:
    manifest = read_manifest(stage)
    assert find_damage(stage, manifest, whole=True) == []
    (stage / name).chmod(0)
    act = (
        (lambda: read_manifest(stage))
        if name == "manifest.json"
        else (lambda: find_damage(stage, manifest, whole=True))
    )
    said = as_another_user(act)
    assert said.startswith(f"UnreadableError: {stage / name}")
    assert "--force" not in said


def test_error_below_a_folder_of_another_user_is_one_line(stage: Path) -> None:
    stage.chmod(0)
    error = PermissionError(errno.EACCES, "Permission denied", str(stage / "model"))
    said = as_another_user(lambda: storage_problem(error, stage / "model"))
    assert "not permitted" in said
    assert "Error:" not in said
