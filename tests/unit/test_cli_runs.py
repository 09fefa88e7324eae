"""align runs, align logs and align open on folders made by hand."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from align.cli.runs import logs, open_, runs_
from align.core.errors import ArtifactError
from align.core.lock import RUN_LOCK, StageLock

RECIPE = """\
name: toy
stages:
  base: {kind: base, path: somewhere}
  sft: {kind: sft, init: base, data: [{world: sft}]}
"""
LIMIT_S = 120.0


def stage(run: Path, name: str, *, done: bool, log: str = "") -> Path:
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "log.txt").write_text(log)
    if done:
        (folder / "manifest.json").write_text("{}")
    return folder


def test_runs_lists_stages_done_and_failed_expectations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(tmp_path / "whole", "base", done=True)
    stage(tmp_path / "whole", "sft", done=True)
    expectations = [{"key": "x", "holds": False}, {"key": "y", "holds": True}]
    (tmp_path / "whole" / "summary.json").write_text(json.dumps({"expectations": expectations}))
    stage(tmp_path / "part", "base", done=True)
    (tmp_path / "no_run").mkdir()
    runs_(tmp_path)
    part, whole = capsys.readouterr().out.splitlines()
    assert part.startswith("part   1 of 2 stages done, next: sft, ")
    assert whole.startswith("whole  2 of 2 stages done, 2")
    assert whole.endswith(", 1 of 2 expectations FAILED")


def test_runs_tells_running_killed_stopped_and_failed_runs_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {
        "failed": "07:00:00 training: 9 steps\n07:00:01 error: the loss is nan\n    a detail\n",
        # A resume appends to the log of the attempt before.
        "stopped": "07:00:01 error: full\n07:00:02 sft: stopped by a signal\n",
        "resumed": "07:00:01 error: full\n07:00:02 starting 2 processes\n07:00:03 sft: stopped\n",
        # The launcher stops the other rank when one has failed.
        "two": "06:00:00 error: old\n07:00:00 starting 2 processes\n07:00:01 [rank 1] error: stage "
        "sft failed: no memory\n07:00:02 sft: stopped by a signal\n",
    }
    for name in ("failed", "killed", "lost", "resumed", "running", "stage", "stopped", "two"):
        stage(tmp_path / name, "base", done=True)
        stage(tmp_path / name, "sft", done=False, log=said.get(name, ""))
    running = StageLock(tmp_path / "running", RUN_LOCK)
    alone = StageLock(tmp_path / "stage" / "sft")
    # The first process ends without releasing its lock; the other was on a machine that went down.
    program = (
        "import os, sys; from pathlib import Path; from align.core.lock import *\n"
        "StageLock(Path(sys.argv[1]), RUN_LOCK); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "killed")], check=False)
    lock = tmp_path / "lost" / RUN_LOCK
    lock.write_text(json.dumps({"host": "node7", "place": "elsewhere", "pid": 1, "started": "1"}))
    os.utime(lock, (1, 1))
    try:
        runs_(tmp_path)
    finally:
        running.release()
        alone.release()
    lines = [line.split(", ")[:2] for line in capsys.readouterr().out.splitlines()]
    assert [line[-1].strip() for line in lines] == [
        *("failed in sft", "the loss is nan", "killed in sft", "killed in sft", "stopped in sft"),
        *("running: sft", "running: sft", "stopped in sft", "failed in sft", "no memory"),
    ]
    # Looking changes nothing.
    assert not list(tmp_path.rglob("*.tmp"))
    assert lock.is_file()


DAMAGES = (b"", b"null", b"[]", b"3", b"[" * 100_000, b"\xff\xfe", bytes(9), b'{"expectations": 3}')


@pytest.mark.parametrize("file", ["summary.json", "sft/recipe.yaml", "sft/manifest.json"])
def test_a_damaged_run_is_listed_and_hides_no_other(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, content in enumerate(DAMAGES):
        run = tmp_path / f"run{number}"
        for name in ("base", "sft"):
            stage(run, name, done=True)
        (run / file).write_bytes(content)
    runs_(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"run{number}  2 of 2 stages done" for number in range(len(DAMAGES))
    ]


def test_runs_of_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no runs in this folder"):
        runs_(tmp_path)
    with pytest.raises(ArtifactError, match="gone: no such folder"):
        runs_(tmp_path / "gone")


def test_logs_show_the_end_of_the_stage_that_began_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = stage(tmp_path, "base", done=True, log="old\n")
    os.utime(old / "recipe.yaml", (1, 1))
    stage(tmp_path, "sft", done=False, log="".join(f"line {i}\x1b[2J\n" for i in range(50)))
    logs(tmp_path, follow=False)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/sft/log.txt:"
    assert len(rest) == 20
    assert rest[-1].startswith("line 49")
    assert "\x1b" not in rest[-1]
    logs(tmp_path / "base", follow=False)
    assert capsys.readouterr().out.splitlines()[-1] == "old"
    with pytest.raises(ArtifactError, match=r"no log\.txt"):
        logs(tmp_path / "nothing", follow=False)


def test_logs_follow_new_lines(tmp_path: Path) -> None:
    folder = stage(tmp_path, "sft", done=False, log="first\n")
    command = [sys.executable, "-u", "-m", "align.cli", "logs", "-f", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    guard = threading.Timer(LIMIT_S, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        lines = iter(process.stdout)
        assert next(lines).endswith("log.txt:\n")
        assert next(lines) == "first\n"
        with (folder / "log.txt").open("a") as f:
            f.write("second\n")
        assert next(lines) == "second\n"
    finally:
        guard.cancel()
        process.kill()
        process.wait()


def test_open_prints_the_report_and_needs_no_browser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    (tmp_path / "report.html").write_text("x")
    open_(tmp_path)
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    assert not opened
    monkeypatch.setenv("DISPLAY", ":0")
    open_(tmp_path)
    assert opened == [(tmp_path / "report.html").resolve().as_uri()]
