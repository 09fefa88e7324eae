"""Compare sides: each its own process, one round of A, one of B, and again; ratios per pair."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT_S = 900.0


class SideError(RuntimeError):
    """A side died; the message names its log."""


class Side:
    """Drive one side's process, which computes only between ``go`` and its answer."""

    def __init__(
        self, name: str, target: str, work: Mapping[str, Any], *, python: str = sys.executable
    ) -> None:
        """Start the process; it builds what it needs until ``wait_ready``.

        Args:
            name: of the side, for its log file. target: ``module:function``.
            work: what the function is told. python: interpreter that runs it.
        """
        out = Path(work["out"])
        out.mkdir(parents=True, exist_ok=True)
        self.name, self.rounds, self.start_s = name, [], 0.0
        self._log = out / f"{name}.log"
        self._began = time.monotonic()
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(work["threads"]),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(out / "datasets"),
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.side", target, json.dumps(work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                cwd=ROOT,
                text=True,
            )

    def wait_ready(self) -> None:
        """Wait until everything is built."""
        self._read()
        self.start_s = time.monotonic() - self._began

    def go(self) -> dict[str, Any]:
        """Run one round and give its facts."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.rounds.append(self._read())
        return self.rounds[-1]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            text = self._log.read_text(errors="replace")
            began = max(text.rfind("Traceback"), 0)
            raise SideError(
                f"side {self.name} ended ({self._process.returncode}):\n{text[began:][:3000]}"
            )
        return json.loads(line)


def alternate(sides: Sequence[Side], *, warmup: int, rounds: int) -> None:
    """Run ``warmup`` and then ``rounds`` rounds of the ready sides in turn."""
    for _ in range(warmup + rounds):
        for side in sides:
            side.go()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(side: Side, *, warmup: int, units: float | str) -> dict[str, Any]:
    """Sum the timed rounds of a side up.

    Args:
        side: after its rounds. warmup: leading rounds that do not count.
        units: work of a round (tokens, pairs, 1 for a step), or the fact that holds it.
    """
    timed = side.rounds[warmup:]
    rates = [(r[units] if isinstance(units, str) else units) / r["seconds"] for r in timed]
    return {
        "seconds": spread([r["seconds"] for r in timed]),
        "rate": spread(rates),
        "rates": rates,
        "cpu_s": spread([r["cpu_s"] for r in timed]),
        "peak_mib": max(r["peak_mib"] for r in side.rounds),
        "start_s": side.start_s,
        "first_rounds": side.rounds[:3],
        "last_round": side.rounds[-1],
    }


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Return the ratio of the rates, pair by pair."""
    return spread([a / b for a, b in zip(ours["rates"], theirs["rates"], strict=True)])


def same_numbers(
    ours: Side, theirs: Side, checks: Sequence[tuple[str, str, int, float]]
) -> dict[str, Any]:
    """Compare named numbers of the first rounds, in which both sides take the same steps.

    Args:
        ours: one side. theirs: the other.
        checks: (our name, their name, number of rounds, largest relative difference).

    Returns:
        The numbers, and whether all are within their bounds.
    """
    rows, equal = [], True
    for a, b, rounds, bound in checks:
        pairs = list(zip(ours.rounds[:rounds], theirs.rounds[:rounds], strict=True))
        differences = [abs(x[a] - y[b]) / max(abs(x[a]), abs(y[b]), 1e-6) for x, y in pairs]
        equal = equal and max(differences) <= bound
        rows.append(
            {
                "what": b,
                "ours": [x[a] for x, _ in pairs],
                "theirs": [y[b] for _, y in pairs],
                "largest_difference": max(differences),
                "bound": bound,
            }
        )
    return {"numbers": rows, "equal": equal}
