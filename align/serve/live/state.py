"""What runs there are and what each is doing, read from their folders without writing to them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from align.core.artifacts import MANIFEST, read_json_object
from align.core.errors import AlignError, ArtifactError
from align.core.lock import RUN_LOCK, is_held
from align.core.log import (
    ALARMS_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    short_number,
)
from align.core.text import visible
from align.pipeline.following import last_end, last_error, tail_lines
from align.pipeline.progress import SHOWN
from align.recipe.load import RECIPE_FILE, read_resolved
from align.report.read import RunRecord, read_run
from align.serve.errors import not_found
from align.serve.live.process import foreign_host, holder

PARTS = {
    "series": (METRICS_FILE, EVALUATIONS_FILE),
    "status": (METRICS_FILE, MANIFEST, RECIPE_FILE, ALARMS_FILE),
    "results": (MANIFEST, RECIPE_FILE, ALARMS_FILE, "preflight.json"),
    "samples": (SAMPLES_FILE,),
    "log": ("log.txt",),
}
"""Parts of a run's page, with the files of its stages that each of them shows."""
MAX_RECORDS = 8
PAGE = 50
"""Runs on a page of their table."""
RETRIES = 3


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run is doing.

    Attributes:
        name: of its folder.
        state: ``running``, ``done``, ``stopped``, ``failed``, ``killed`` or ``damaged``.
        done: number of stages that are done.
        total: number of stages of the recipe.
        stage: the stage that runs, or is next; empty if all are done.
        step: steps done in that stage.
        total_steps: steps of that stage; 0 if nothing is logged yet.
        left_s: estimated seconds until the end of that stage, while it runs.
        headline: its most important metrics.
        changed: when the run last wrote something.
        problem: why the run has failed, failed expectations, or what is damaged.
        host: another machine on which it runs.
    """

    name: str
    state: str
    done: int = 0
    total: int = 0
    stage: str = ""
    step: int = 0
    total_steps: int = 0
    left_s: float | None = None
    headline: str = ""
    changed: datetime | None = None
    problem: str = ""
    host: str | None = None

    @property
    def fraction(self) -> float:
        """Return the part of the run that is done: stages count the same, whatever they take."""
        part = min(1.0, self.step / self.total_steps) if self.total_steps and self.stage else 0.0
        return min(1.0, (self.done + part) / self.total) if self.total else 0.0


def find_run(runs: Path, name: str) -> Path:
    """Return the folder of a run.

    Raises:
        ServeError: there is no run of this name.
    """
    # A name is one part of a path, so that nothing outside of the folder is reachable.
    plain = bool(name) and not name.startswith(".") and Path(name).name == name and "\0" not in name
    if not plain or not stages_of(runs / name):
        raise not_found("run", name)
    return runs / name


def newest_runs(runs: Path, page: int = 0) -> tuple[list[RunState], bool]:
    """Return the states of a page of runs, those that last changed first, and if there are more.

    Args:
        runs: their folder.
        page: number of the page, from 0.
    """
    try:
        places = [path for path in runs.iterdir() if not path.name.startswith(".")]
    except OSError:
        return [], False
    found = [(_changed(stages), path) for path in places if (stages := stages_of(path))]
    found.sort(key=lambda entry: (entry[0] or datetime.min, entry[1]), reverse=True)
    # The recipe of a run takes a while to read, so only those that are shown are read.
    shown = found[page * PAGE : (page + 1) * PAGE]
    return [state_of(path) for _, path in shown], len(found) > (page + 1) * PAGE


def stages_of(run_dir: Path) -> list[Path]:
    """Return the folders of a run's stages, by when they began."""
    found = []
    try:
        for path in run_dir.glob(f"*/{RECIPE_FILE}"):
            # A link to nothing counts: reading it fails with its name. `.old` is what a stage had
            # before it was run again.
            if not path.parent.name.endswith(".old"):
                found.append((path.lstat().st_mtime, path.parent))
    except OSError:  # set aside while we look
        pass
    return [path for _, path in sorted(found)]


def state_of(run_dir: Path) -> RunState:
    """Return what a run is doing, from the ends of its files."""
    stages = stages_of(run_dir)
    changed = _changed(stages)
    try:
        names = _names(stages[-1] / RECIPE_FILE)
    except (AlignError, IndexError) as error:
        return RunState(run_dir.name, "damaged", changed=changed, problem=visible(str(error)))
    done = [name for name in names if (run_dir / name / MANIFEST).is_file()]
    # The stage that works is the one that began last; if it is done, the next in the recipe.
    left = [name for name in names if name not in done]
    begun = [path.name for path in stages if path.name in left]
    stage = begun[-1] if begun else (left[0] if left else "")
    host = foreign_host(run_dir)
    locks = [is_held(run_dir, RUN_LOCK, probe=False), is_held(run_dir / stage, probe=False)]
    # A stage that a launcher started without align run has only a lock of its own.
    running = True in locks or host is not None or holder(run_dir) is not None
    idle = last_end(run_dir / stage, locks) if stage else "done"
    problem = visible(last_error(run_dir / stage)) if idle == "failed" and not running else ""
    shown = stage or names[-1]
    rows = list(tail_rows(run_dir / shown / METRICS_FILE))
    if not stage:
        # The last stage evaluates as a rule: the metrics of the last one that trained are shown.
        logged = (list(tail_rows(run_dir / name / METRICS_FILE)) for name in reversed(names))
        rows = next((rows for rows in logged if _headline(rows)), [])
    step, total = _steps(rows[-1]) if rows and stage else (0, 0)
    return RunState(
        name=run_dir.name,
        state="running" if running else idle,
        done=len(done),
        total=len(names),
        stage=stage,
        step=step,
        total_steps=total,
        left_s=_left(rows) if running and stage else None,
        headline=_headline(rows),
        changed=changed,
        problem=problem or _failed_expectations(run_dir),
        host=host,
    )


def _names(recipe: Path) -> tuple[str, ...]:
    """Return the names of the stages of a resolved recipe; unless it changes, it is read once.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        stat = recipe.stat()
    except OSError:
        return tuple(read_resolved(recipe).stages)  # which says why
    return _read_names(recipe, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=4096)
def _read_names(recipe: Path, *_version: int) -> tuple[str, ...]:
    return tuple(read_resolved(recipe).stages)


def tail_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines at the end of a file that may be damaged or half-written."""
    for line in tail_lines(path)[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def _steps(row: dict[str, Any]) -> tuple[int, int]:
    total = row.get("total_steps")
    return row["step"], total if isinstance(total, int) else 0


def _left(rows: list[dict[str, Any]]) -> float | None:
    """Return the seconds until a stage's last step, at the speed of its last lines."""
    known = [(r["step"], r["time_s"]) for r in rows if isinstance(r.get("time_s"), int | float)]
    if len(known) < 2:
        return None
    (first, began), (step, now) = known[0], known[-1]
    left = _steps(rows[-1])[1] - step
    return (now - began) / (step - first) * left if step > first and left > 0 else None


def _headline(rows: list[dict[str, Any]]) -> str:
    """Return the two most important metrics; evaluations are not in every line."""
    newest: dict[str, float] = {}
    for row in rows:
        newest |= {name: row[name] for name in SHOWN if isinstance(row.get(name), int | float)}
    named = [f"{name} {short_number(newest[name])}" for name in SHOWN if name in newest]
    return ", ".join(named[:2])


def _failed_expectations(run_dir: Path) -> str:
    listed = (read_json_object(run_dir / "summary.json") or {}).get("expectations")
    entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    failed = sum(not entry.get("holds", True) for entry in entries)
    return f"{failed} of {len(entries)} expectations failed" if failed else ""


def _changed(stages: list[Path]) -> datetime | None:
    found = []
    for stage in stages:
        for name in {name for names in PARTS.values() for name in names}:
            try:
                found.append((stage / name).stat().st_mtime)
            except OSError:
                continue
    return datetime.fromtimestamp(max(found)) if found else None


def versions(run_dir: Path) -> dict[str, str]:
    """Return a text for each part of a run's page that changes when its files do."""
    stages = stages_of(run_dir)
    found = {}
    for part, names in PARTS.items():
        places = [stage / name for stage in stages for name in names]
        if part in ("status", "results"):
            places.append(run_dir / "summary.json")
        seen = [str(holder(run_dir))] if part == "status" else []
        for place in places:
            try:
                stat = place.stat()
            except OSError:
                continue
            seen.append(f"{place} {stat.st_mtime_ns} {stat.st_size} {stat.st_ino}")
        found[part] = hashlib.sha256("\n".join(seen).encode()).hexdigest()[:12]
    return found


class Records:
    """The records of the runs that were last looked at, read again when their files change."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: dict[Path, tuple[dict[str, str], RunRecord]] = {}

    def of(self, run_dir: Path) -> RunRecord:
        """Return the record of a run.

        Raises:
            ArtifactError: the folder cannot be read.
            RecipeError: its recipe is damaged.
        """
        # One reader at a time: several open pages of a run need it read once.
        with self._lock:
            now = versions(run_dir)
            before = self._found.pop(run_dir, None)
            record = before[1] if before is not None and before[0] == now else _read(run_dir)
            self._found[run_dir] = (now, record)
            while len(self._found) > MAX_RECORDS:
                self._found.pop(next(iter(self._found)))
            return record


def _read(run_dir: Path) -> RunRecord:
    """Return a run's record; a stage's folder may be set aside while it is read."""
    for _ in range(RETRIES):
        try:
            return read_run(run_dir)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ArtifactError(f"{run_dir}: cannot be read ({error.strerror})") from error
    raise ArtifactError(f"{run_dir}: its files change while they are read. Try again")
