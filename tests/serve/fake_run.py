"""Stand in for ``align run``: the same files, locks, signals and exit codes, without a model.

Usage: python fake_run.py RECIPE --runs DIR [--set KEY=VALUE ...]. The seed of the recipe is the
number of steps; from 1000 on, the run fails with a message. With ``STUBBORN`` it ignores SIGTERM,
as does the stage that it starts in a session of its own. Where DIR has a file ``HOLD``, it waits
after as many steps as that says, until the file says more or is gone.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STEP_S = 0.03
STUBBORN = 999
HOLD = "hold"
IGNORE = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(); signal.pause()"


def main() -> None:
    """Append the missing steps to metrics.jsonl, one at a time, then write the model."""
    recipe = json.loads(Path(sys.argv[1]).read_text())
    run = Path(sys.argv[sys.argv.index("--runs") + 1]) / recipe["name"]
    stage = run / "train"
    stage.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stdout.write("another run is using this folder\n")
            sys.exit(2)
        with (run / "starts").open("a") as f:
            f.write(f"{os.getpid()}\n")
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
        if recipe["seed"] == STUBBORN:
            ignore_sigterm(run)
        if recipe["seed"] >= 1000:
            sys.stdout.write("train: failed\n    12:00:00 train: no row is left of 12\n")
            sys.exit(1)
        metrics = stage / "metrics.jsonl"
        lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
        metrics.write_bytes(b"".join(line + b"\n" for line in lines))
        with metrics.open("a") as f:
            for step in range(len(lines) + 1, recipe["seed"] + 1):
                time.sleep(STEP_S)
                while step > steps_allowed(run.with_name(HOLD)):
                    time.sleep(STEP_S)
                row = {"step": step, "total_steps": recipe["seed"], "train/loss": 1 / step}
                row |= {"tokens/trained": 7.0}
                f.write(json.dumps(row) + "\n")
                f.flush()
        (stage / "model").mkdir(exist_ok=True)


def steps_allowed(hold: Path) -> float:
    """Return how many steps the file allows."""
    try:
        return int(hold.read_text())
    except FileNotFoundError:
        return float("inf")


def ignore_sigterm(run: Path) -> None:
    """Start a process like this one, record both once they ignore SIGTERM, and wait for ever."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    argv = [sys.executable, "-c", IGNORE]
    child = subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    with (run / "stubborn").open("a") as f:
        f.write(f"{os.getpid()} {child.pid}\n")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
