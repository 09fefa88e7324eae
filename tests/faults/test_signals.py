"""Exit code 75 whenever a signal came and work can go on; nothing outlives `align run`."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from align.core import distributed
from align.core.errors import Preempted
from align.core.lock import started_at
from align.pipeline import run
from align.pipeline.terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
name: toy
stages:
  a: {kind: base, build: {vocab_size: 64}, data: [{world: corpus}], steps: 1}
  b: {kind: sft, init: a, data: [{world: sft}]}
"""
# A stage without a model: it is started as a module, as `align run` starts align.stages.
STAGE = """\
import argparse, os, signal, sys, time
from pathlib import Path
from align.core.artefacts import spec_hash, write_manifest
from align.recipe.load import read_resolved
parser = argparse.ArgumentParser()
for name in ("kind", "--resolved", "--stage", "--run-dir"):
    parser.add_argument(name)
args = parser.parse_args()
recipe, out = read_resolved(args.resolved), Path(args.run_dir) / args.stage
(out / "begun.json").write_text('{"spec_hash": "0"}')
Path("pid").write_text(str(os.getpid()))
MODE
spec = recipe.stages[args.stage]
print(f"{args.stage} ran")
write_manifest(out, {"kind": "policy", "stage": args.stage, "seconds": 1.0, "metrics": {},
    "spec_hash": spec_hash(spec.model_dump(mode="json"), seed=0,
    inputs={})})
"""
MODES = {
    # The signal comes when all is done but the end of the process.
    "last moment": "signal.signal(signal.SIGTERM, lambda *_: None); Path('ready').touch();"
    "signal.sigtimedwait([], 2)",
    "fails after": "signal.signal(signal.SIGTERM, lambda *_: sys.exit(MODE_CODE));"
    "Path('ready').touch(); signal.pause()",
    "no handler": "Path('ready').touch(); signal.pause()",
}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    Path("r.yaml").write_text(RECIPE)


def start(mode: str) -> subprocess.Popen[str]:
    Path("stage_without_model.py").write_text(STAGE.replace("MODE", mode))
    code = (
        "import sys; from align.pipeline import run;"
        "sys.exit(run('r.yaml', module='stage_without_model'))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while not Path("ready").exists():
        assert process.poll() is None, process.communicate()[0]
        os.sched_yield()
    return process


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_moment_of_a_stage_starts_no_other(signum: int) -> None:
    process = start(MODES["last moment"])
    process.send_signal(signum)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 75, shown
    assert Path("runs/toy/a/manifest.json").is_file()
    assert not Path("runs/toy/b").exists()
    assert "stopped by a signal before b" in shown


@pytest.mark.parametrize("code", [1, 2])
def test_a_stage_that_fails_after_a_signal_has_failed(code: int) -> None:
    process = start(MODES["fails after"].replace("MODE_CODE", str(code)))
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == code, shown
    assert "failed" in shown


def test_a_stage_that_takes_no_signal_yet_is_preempted() -> None:
    process = start(MODES["no handler"])
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 75, shown
    assert "no new checkpoint" in shown


def test_a_signal_before_the_first_stage_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import align.pipeline.running as running

    planned = running.plan

    def plan_and_signal(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return planned(*args)

    monkeypatch.setattr(running, "plan", plan_and_signal)
    shown = io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    assert run("r.yaml", terminal=Terminal(Console(file=shown))) == 75
    assert not Path("runs/toy/a").exists()
    assert signal.getsignal(signal.SIGTERM) is before


WORKER = """\
import os, signal, sys, time
from align.core import distributed
distributed.install()
try:
    print("ready", flush=True)
    BODY
except distributed.StoppedNow as e:
    sys.exit(e.code)
"""


def worker(body: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER.replace("BODY", body)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def test_outside_the_steps_a_signal_ends_a_stage_at_once_past_every_except() -> None:
    body = "\n    while True:\n        try: time.sleep(60)\n        except Exception: pass"
    process = worker(body)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75


def test_between_steps_a_signal_waits_for_the_step() -> None:
    @distributed.stops_between_steps
    def train() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return sum(range(10))

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    distributed.install()
    try:
        with pytest.raises(Preempted, match="after the last step"):
            train()
    finally:
        distributed._asked = False
        for signum, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(signum, handler)


def test_a_stage_ends_when_its_align_run_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process = worker("time.sleep(600)", ALIGN_PARENT=f"{parent.pid}:{started_at(parent.pid)}")
    assert process.stdout is not None
    process.stdout.readline()
    assert process.poll() is None
    parent.kill()
    parent.wait()
    assert process.wait(timeout=120) == 75


def test_a_stage_of_another_parent_goes_on() -> None:
    process = worker("time.sleep(2.5)")
    assert process.wait(timeout=120) == 0
