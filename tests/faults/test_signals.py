"""Exit code 75 whenever a signal came and work can go on; nothing outlives `align run`."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from align.core import checkpoints, distributed
from align.core.errors import ArtifactError, Preempted
from align.core.lock import started_at
from align.pipeline.running import run
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
from align.core.artifacts import spec_hash, write_manifest
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
    "spec_hash": spec_hash(spec.settings(), seed=0,
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
        "import sys; from align.pipeline.running import run;"
        "sys.exit(run('r.yaml', module='stage_without_model'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also below nohup
        stdout=subprocess.PIPE,
        text=True,
    )
    while not Path("ready").exists():
        assert process.poll() is None, process.communicate()[0]
        os.sched_yield()
    return process


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_last_moment_of_a_stage_starts_no_other(signum: int) -> None:
    process = start(MODES["last moment"])
    process.send_signal(signum)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 75, shown
    assert Path("runs/toy/a/manifest.json").is_file()
    assert not Path("runs/toy/b").exists()
    assert "stopped by a signal before b" in shown


@pytest.mark.parametrize("code", [1, 2])
def test_a_stage_that_fails_after_a_signal_has_failed(code: int) -> None:
    process = start(MODES["fails after"].replace("MODE_CODE", str(code)))
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == code, shown
    assert "failed" in shown


def test_a_stage_that_takes_no_signal_yet_is_preempted() -> None:
    process = start(MODES["no handler"])
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 75, shown
    assert "no new checkpoint" in shown


@pytest.mark.parametrize("removed", ["runs/toy/a", "runs/toy", "runs"])
def test_a_stage_whose_folder_is_removed_ends_with_one_line_and_nothing_is_made_again(
    removed: str,
) -> None:
    process = start(MODES["no handler"])
    shutil.rmtree(removed)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 1, shown
    assert "runs/toy/a: removed while the stage was running." in " ".join(shown.split())
    assert "Traceback" not in shown
    assert not Path("runs/toy/a").exists()


def test_no_checkpoint_is_saved_into_a_removed_folder() -> None:
    Path("runs/toy/a").mkdir(parents=True)
    directory = Path("runs/toy/a/checkpoints")
    checkpoints.save_checkpoint(directory, 1, engines={}, state={}, keep=2)
    shutil.rmtree("runs")
    with pytest.raises(ArtifactError, match="runs/toy/a: removed while the stage was running"):
        checkpoints.save_checkpoint(directory, 2, engines={}, state={}, keep=2)
    assert not Path("runs").exists()


def test_a_signal_while_align_run_imports_is_75() -> None:
    """The first import of the command line blocks: a module of that name stands before it."""
    Path("typer.py").write_text(
        "import signal\nfrom pathlib import Path\nPath('ready').touch()\n"
        "while True:\n    signal.pause()\n"
    )
    command = [sys.executable, "-m", "align", "run", "r.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not Path("ready").exists():
        assert process.poll() is None, process.communicate()[0]
        os.sched_yield()
    process.terminate()
    assert process.wait(timeout=300) == 75
    assert not Path("runs").exists()


LAUNCHER = """\
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[-1]], env={**os.environ, "RANK": "0"})
print(worker.pid, flush=True)
time.sleep(3600)
"""
RANK = """\
import os, signal, time
from pathlib import Path
from align.core import distributed
distributed.install()
Path("ready").touch()
try:
    time.sleep(3600)
except distributed.StoppedNow as e:
    Path("code").write_text(str(e.code))
    os._exit(e.code)
"""


@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_ranks_of_a_launcher_that_is_killed_end_with_75_and_leave_no_orphan(name: str) -> None:
    Path(name).write_text(LAUNCHER)
    command = [sys.executable, name, RANK]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    worker = int(launcher.stdout.readline())
    before = started_at(worker)
    while not Path("ready").exists():
        assert started_at(worker) == before
        os.sched_yield()
    launcher.terminate()
    assert launcher.wait(timeout=300) == -signal.SIGTERM
    while started_at(worker) == before:
        os.sched_yield()
    assert Path("code").read_text() == "75"


def test_a_limit_on_memory_is_named_when_a_stage_dies_of_it() -> None:
    code = (
        "import resource;from align.pipeline.processes import exit_reason;"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, resource.RLIM_INFINITY));"
        "print(exit_reason(-6)); print(exit_reason(1))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    limit = "its memory is limited to 2,048 MiB (ulimit -v). Raise or remove the limit"
    assert ran.stdout.splitlines() == [f"killed by SIGABRT; {limit}", f"exit code 1; {limit}"]


TEMPLATE = ROOT / "launch" / "slurm.sbatch"
STANDS_FOR_ALIGN = """\
#!/bin/bash
echo "$@" > arguments
trap 'kill $!; exit 75' TERM
touch ready
[ -n "${WAITS:-}" ] && { sleep 3600 >/dev/null 2>&1 & wait; }
exit "$CODE"
"""


def slurm_job(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    for name, text in {
        "align": STANDS_FOR_ALIGN,
        "scontrol": '#!/bin/bash\necho "$@" > requeued\n',
        "srun": '#!/bin/bash\necho $$ > task; shift; exec "$@"\n',
        "scancel": '#!/bin/bash\necho "$@" > cancelled; kill -TERM "$(cat task)"\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(TEMPLATE), "r.yaml", "--set", "seed=1"],
        env=os.environ | {"PATH": path, "SLURM_JOB_ID": "42"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_slurm_template_passes_the_signal_on_and_requeues_on_75(tmp_path: Path) -> None:
    process = slurm_job(tmp_path, WAITS="1", CODE="0")
    while not Path("ready").exists():
        assert process.poll() is None, process.communicate()[0]
        os.sched_yield()
    process.terminate()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert Path("arguments").read_text() == "run r.yaml --set seed=1\n"
    assert Path("requeued").read_text() == "requeue 42\n"


def test_the_slurm_template_starts_several_tasks_with_srun_and_signals_the_tasks(
    tmp_path: Path,
) -> None:
    process = slurm_job(tmp_path, WAITS="1", CODE="0", SLURM_NTASKS="2")
    while not Path("ready").exists():
        assert process.poll() is None, process.communicate()[0]
        os.sched_yield()
    process.terminate()
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert Path("arguments").read_text() == "run r.yaml --set seed=1\n"
    assert Path("cancelled").read_text() == "--signal=TERM 42\n"
    assert Path("requeued").read_text() == "requeue 42\n"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_slurm_template_requeues_nothing_else(code: int, tmp_path: Path) -> None:
    process = slurm_job(tmp_path, CODE=str(code))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said
    assert not Path("requeued").exists()


def test_the_slurm_template_warns_longer_before_the_end_than_a_stage_may_take() -> None:
    from align.pipeline.running import GRACE_S

    options = dict(
        re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", TEMPLATE.read_text(), re.MULTILINE)
    )
    signal_name, _, seconds = options["signal"].partition("@")
    assert signal_name == "B:TERM"
    assert int(seconds) > GRACE_S
    assert "requeue" in options


def test_slurm_accepts_the_template() -> None:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        pytest.skip("sbatch is not installed, so Slurm cannot read the template")
    if subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode != 0:
        pytest.skip("sbatch is installed, but no Slurm controller answers")
    subprocess.run([sbatch, "--test-only", str(TEMPLATE), "r.yaml"], check=True)


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
    assert process.wait(timeout=300) == 75


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
    assert process.wait(timeout=300) == 75


def test_a_stage_of_another_parent_goes_on() -> None:
    process = worker("time.sleep(2.5)")
    assert process.wait(timeout=300) == 0
