"""Faults, what came of them, and the table that is printed."""

import json
import random
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Result = Literal["held", "failed", "unclear"]
LONGEST = 12
"""Lines that a refusal may have: it is read at once, not searched for its reason."""


class Failed(Exception):
    """A promise was broken: other bytes, lost work, a hang, a wrong exit code."""


class Unclear(Exception):
    """Nothing was lost, but the message does not say what is wrong."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one fault is injected: a new folder, the clean run to compare with, and chance."""

    folder: Path
    clean: Path
    seconds: dict[str, float]
    """Duration of each stage of the clean run."""
    rng: random.Random


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: the row of the table that counts it, a name to find it by, and its injection."""

    kind: str
    name: str
    inject: Callable[[Place], None]
    cost: float = 1.0
    """About how many seconds it takes; the expensive ones start first."""

    @property
    def key(self) -> str:
        """Name by which ``--only`` finds the fault again."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one fault."""

    kind: str
    name: str
    result: Result
    detail: str
    seconds: float
    seed: int
    commit: str

    @property
    def key(self) -> str:
        """Name of the fault."""
        return f"{self.kind}/{self.name}"


def refused(code: int, said: str, *, names: str = "") -> None:
    """Check that a command refused a user's fault as it should.

    Args:
        code: its exit code, which must be 2.
        said: everything it said: a few lines without a traceback.
        names: a pattern that the message must contain, such as the file at fault.
    """
    if code != 2:
        raise Failed(f"exit code {code}, expected 2: {said[-600:]}")
    no_traceback(said)
    if names and not re.search(names, said):
        raise Unclear(f"does not name {names}: {said[-600:]}")


def no_traceback(said: str) -> None:
    """Check that no traceback and no last-resort message was shown."""
    if re.search(r"Traceback \(most recent|this is a bug in align|The traceback is in", said):
        raise Unclear(f"a traceback: {said[-900:]}")


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the table of all kinds in the order of their first fault, and the sum."""
    rows: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        row = rows.setdefault(outcome.kind, {"held": 0, "failed": 0, "unclear": 0})
        row[outcome.result] += 1
    total = {key: sum(row[key] for row in rows.values()) for key in ("held", "failed", "unclear")}
    lines = ["| fault | tried | held | failed | unclear |", "|---|---|---|---|---|"]
    for kind, row in [*rows.items(), ("all", total)]:
        counts = (sum(row.values()), row["held"], row["failed"], row["unclear"])
        lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def append(outcome: Outcome, path: Path) -> None:
    """Add one line of JSON to a file of outcomes."""
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(asdict(outcome)) + "\n")


def read(path: Path, seed: int) -> dict[str, Outcome]:
    """Return the last outcome of each fault that a file has for a seed, by the fault's key."""
    if not path.is_file():
        return {}
    outcomes = [Outcome(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    return {o.key: o for o in outcomes if o.seed == seed}


def left_to_try(faults: Sequence[Fault], found: Mapping[str, Outcome]) -> list[int]:
    """Return the positions of the faults that are not among ``found``, or did not hold."""
    return [i for i, f in enumerate(faults) if f.key not in found or found[f.key].result != "held"]


def commit() -> str:
    """Return the commit of this checkout, with ``+`` where files differ from it."""
    here = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"
