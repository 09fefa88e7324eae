"""Locks, second starters, and `align run` itself under kill -9: by real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from align.core.distributed import ORPHAN_GRACE_S
from tests.faults.campaign import clean, forked, recipe
from tests.faults.campaign.align_run import run_stage
from tests.faults.campaign.kills import begin, finish, prepare
from tests.faults.campaign.ledger import Failed, Fault, Place, no_traceback, refused

ROOT = Path(__file__).resolve().parents[3]
REAL_COST = 40.0
LOCKS = {
    "empty": "",
    "garbage": "\x00\xff{",
    "null": "null",
    "list": "[]",
    "dead": '{"host": "HOST", "place": "PLACE", "pid": 4194303, "started": "1"}',
    "reused": '{"host": "HOST", "place": "PLACE", "pid": OWN, "started": "1"}',
    "text for a pid": '{"host": "HOST", "place": "PLACE", "pid": "x", "started": "1"}',
    "other machine": '{"host": "node7", "place": "elsewhere", "pid": 1, "started": "1"}',
}


def faults(*, quick: bool) -> Iterator[Fault]:
    """Yield every fault of ownership; the quick part starts no process anew."""
    for stage in ("sft",) if quick else ("sft", "curate", "ppo", "trl", "base"):
        for i in range(1 if quick else 3):
            yield Fault("a second starter", f"{stage} {i}", partial(_second, stage), 2.0)
    for stage in () if quick else ("sft", "curate"):
        for name in LOCKS:
            for age in (0.0, 3600.0):
                inject = partial(_lock, stage, name, age)
                yield Fault("a lock that was left behind", f"{stage} {name} {age:.0f}", inject)
    if quick:
        return
    for i, stage in enumerate(("sft", "ppo", "trl", "sft_z2")):
        for how in REAL:
            inject = partial(REAL[how], stage)
            yield Fault(f"{how}, by the command line", f"{stage} {i}", inject, REAL_COST)


def _second(stage: str, place: Place) -> None:
    """Start a stage twice: one works, the other is refused, and the bytes are right."""
    prepare(place, stage)
    first = begin(place, stage)
    first.wait_until(place.rng.uniform(0.0, 0.9) * place.seconds[stage])
    second = begin(place, stage, log="second.txt")
    codes = [first.wait()[0], second.wait()[0]]
    said = second.said() + first.said()
    first.log.unlink()
    second.log.unlink()
    no_traceback(said)
    if 0 not in codes or not set(codes) <= {0, 2}:
        raise Failed(f"exit codes {codes}: {said[-900:]}")
    if 2 in codes:
        refused(2, said, names="stage")
    clean.same(place.clean, place.folder, stage)


def _lock(stage: str, name: str, age_s: float, place: Place) -> None:
    """Leave a lock of some content and age: taken over, or refused with what to do."""
    from align.core.lock import _here

    prepare(place, stage)
    folder = place.folder / recipe.RUN / stage
    folder.mkdir()
    path = folder / "stage.lock"
    text = LOCKS[name].replace("OWN", str(os.getpid())).replace("PLACE", _here())
    path.write_text(text, encoding="latin-1")
    then = time.time() - age_s
    os.utime(path, (then, then))
    run = begin(place, stage)
    codes, said = run.wait(), run.said()
    run.log.unlink()
    if age_s or name in ("dead", "reused"):
        if any(codes):
            raise Failed(f"a dead lock was not taken over: {codes}: {said[-600:]}")
        clean.same(place.clean, place.folder, stage)
        return
    refused(codes[0], said, names="stage.lock")
    path.unlink()
    finish(place, stage)


def start_align(place: Place, stage: str, *words: str) -> subprocess.Popen[bytes]:
    """Start `align run --only STAGE` as a user does."""
    command = [sys.executable, "-m", "align", "run", "recipe.yaml", "--runs", ".", "--only", stage]
    env = os.environ | forked.ENVIRONMENT | {"PYTHONPATH": str(ROOT), "COLUMNS": "1000"}
    with (place.folder / "align.txt").open("ab") as out:
        return subprocess.Popen(
            [*command, *words],
            cwd=place.folder,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _said(place: Place) -> str:
    path = place.folder / "align.txt"
    text = path.read_text(errors="replace")
    path.unlink()
    return text


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=forked.LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise Failed("align run hangs") from None


def _working(place: Place, stage: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the stage has written its first checkpoint, or the first line of its log."""
    folder = place.folder / recipe.RUN / stage
    marks = [folder / "begun.json", folder / "metrics.jsonl", folder / "checkpoints"]
    mark = place.rng.choice(marks)
    until = time.monotonic() + forked.LIMIT_S
    while not mark.exists() and process.poll() is None:
        if time.monotonic() > until:
            raise Failed(f"{mark} never came")
        time.sleep(0.02)


def _processes_of(folder: Path) -> list[int]:
    """Return the processes that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(entry) == str(folder):
                found.append(int(entry.parent.name))
        except OSError:  # it has ended
            continue
    return found


def _resolved(place: Place, stage: str) -> None:
    """Run the stage again until it is done; compare."""
    until = time.monotonic() + forked.LIMIT_S
    while True:
        process = start_align(place, stage)
        code = _wait(process)
        said = _said(place)
        no_traceback(said)
        if code == 0:
            break
        if code != 2 or "is running this stage" not in said or time.monotonic() > until:
            raise Failed(f"starting it again ended with {code}: {said[-900:]}")
        time.sleep(1.0)
    clean.same(place.clean, place.folder, stage)
    _orphans_end(place.folder)


def _orphans_end(folder: Path) -> None:
    """Check that no process works in a folder longer than a stage has to stop."""
    until = time.monotonic() + ORPHAN_GRACE_S + forked.LIMIT_S / 10
    while left := _processes_of(folder):
        if time.monotonic() > until:
            lines = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in left]
            raise Failed(f"processes go on: {dict(zip(left, lines, strict=True))}")
        time.sleep(0.2)


def _parent_killed(stage: str, place: Place) -> None:
    """Kill `align run` alone; the orphan ends, and no one works in its folder meanwhile."""
    prepare(place, stage)
    process = start_align(place, stage)
    _working(place, stage, process)
    process.kill()
    process.wait()
    _said(place)
    _resolved(place, stage)


def _parent_killed_and_forced(stage: str, place: Place) -> None:
    """Kill `align run` alone, then --force: nothing of the orphan is taken over."""
    prepare(place, stage)
    process = start_align(place, stage, "--set", "seed=9")
    _working(place, stage, process)
    process.kill()
    process.wait()
    _said(place)
    until = time.monotonic() + forked.LIMIT_S
    while True:
        code, said = run_stage(place.folder, stage, "--force")
        if code == 0:
            break
        if "is running this stage" not in said or time.monotonic() > until:
            raise Failed(f"--force ended with {code}: {said[-900:]}")
        time.sleep(0.5)
    if "resumed from" in (place.folder / recipe.RUN / stage / "log.txt").read_text():
        raise Failed("--force went on from the orphan's checkpoint")
    _resolved(place, stage)


def _all_killed(stage: str, place: Place) -> None:
    """Kill `align run` and every rank at once."""
    prepare(place, stage)
    process = start_align(place, stage)
    _working(place, stage, process)
    for pid in [process.pid, *_processes_of(place.folder)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    _said(place)
    _resolved(place, stage)


def _stopped(stage: str, place: Place) -> None:
    """SIGTERM to `align run`: 75, or 0 if it was done; then it goes on."""
    prepare(place, stage)
    process = start_align(place, stage)
    _working(place, stage, process)
    process.send_signal(signal.SIGTERM)
    code = _wait(process)
    said = _said(place)
    no_traceback(said)
    if code not in (0, 75):
        raise Failed(f"exit code {code} after SIGTERM: {said[-900:]}")
    if code == 75 and _processes_of(place.folder):
        raise Failed("a rank goes on after 75")
    _resolved(place, stage)


REAL = {
    "kill -9 of align run alone": _parent_killed,
    "kill -9 of align run, then --force": _parent_killed_and_forced,
    "kill -9 of align run and its ranks": _all_killed,
    "SIGTERM to align run": _stopped,
}
