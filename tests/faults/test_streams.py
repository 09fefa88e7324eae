"""A run whose standard streams are closed, full or read by nobody does what it would do anyway."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_signals import RECIPE, ROOT, STAGE

RUN = (
    "import sys; from align.pipeline.running import run; sys.exit(run('r.yaml', module='no_model'))"
)


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    Path("r.yaml").write_text(RECIPE)
    # Some text before the end, so that there is something to write.
    Path("no_model.py").write_text(STAGE.replace("MODE", "print('a line')"))


def _nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def _full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def _closed_terminal() -> None:
    terminal, line = os.openpty()
    os.dup2(line, 1)
    os.close(line)
    os.close(terminal)


@pytest.mark.parametrize("lose", [_nobody_reads, _full, _closed_terminal])
def test_a_run_goes_on_without_its_output(lose: Callable[[], None]) -> None:
    done = subprocess.run([sys.executable, "-c", RUN], preexec_fn=lose, timeout=300)
    assert done.returncode == 0
    assert Path("runs/toy/b/manifest.json").is_file()
    assert "b ran" in Path("runs/toy/b/log.txt").read_text()


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1, 2]])
def test_a_command_whose_streams_are_closed_works_and_writes_into_no_other_file(
    closed: list[int],
) -> None:
    def close() -> None:
        for number in closed:
            os.close(number)

    command = [sys.executable, "-m", "align", "check", "r.yaml"]
    done = subprocess.run(command, preexec_fn=close, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0
    # Without them, the first file that is opened would be standard output.
    code = "from align.__main__ import open_missing_streams as o; o(); f = open('kept', 'w')"
    code += "; print('x'); f.close(); assert f.name == 'kept'"
    subprocess.run([sys.executable, "-c", code], preexec_fn=close, timeout=60, check=True)
    assert Path("kept").read_text() == ""


def test_a_hangup_that_is_ignored_as_under_nohup_stays_ignored() -> None:
    code = (
        "import os, signal; from align.pipeline.processes import Signals\n"
        "with Signals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(signals.count)"
    )

    for handler, expected in ((signal.SIG_IGN, "0"), (signal.SIG_DFL, "1")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            preexec_fn=partial(signal.signal, signal.SIGHUP, handler),
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == expected, done.stderr
