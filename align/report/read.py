"""Read a run folder in any state: finished, unfinished or damaged."""

import json
import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from align.core.artifacts import MANIFEST
from align.core.errors import ArtifactError
from align.core.log import ALARMS_FILE, METRICS_FILE, SAMPLES_FILE
from align.recipe.load import RECIPE_FILE, read_resolved
from align.recipe.schema import Recipe
from align.recipe.schema.evaluate import OWN_TASK

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StageRecord:
    """The files of one stage's folder.

    ``status`` is ``done``, ``changed`` (finished with a configuration that differs from the newest
    recipe), ``unfinished`` or ``not started``.
    """

    name: str
    kind: str
    status: str
    needs: tuple[str, ...]
    manifest: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    alarms: list[Row] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """Return the wall time of the finished stage, else the time logged so far."""
        found = self.manifest.get("seconds")
        if found is None and self.metrics:
            found = self.metrics[-1].get("time_s")
        return found if isinstance(found, int | float) else None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run: its recipe, stages in recipe order, summary, and problems found while reading."""

    directory: Path
    recipe: Recipe
    stages: list[StageRecord]
    summary: Row
    problems: list[str]

    @property
    def finished(self) -> datetime | None:
        """Return when the last stage wrote its manifest, in local time."""
        found = [path.stat().st_mtime for path in self.directory.glob(f"*/{MANIFEST}")]
        return datetime.fromtimestamp(max(found)) if found else None


def read_run(run_dir: Path) -> RunRecord:
    """Return the record of a run folder; an unfinished run is read as far as it exists.

    Hashes are not verified: a report must also be possible for a damaged run.

    Raises:
        ArtifactError: the folder contains no stage.
    """
    problems: list[str] = []
    recipe = _newest_recipe(run_dir)
    stages = [_read_stage(run_dir, recipe, name, problems=problems) for name in recipe.stages]
    summary = _read_summary(run_dir, recipe, problems)
    return RunRecord(run_dir, recipe, stages, summary, problems)


def _newest_recipe(run_dir: Path) -> Recipe:
    # Each stage wrote the recipe that it ran; the run may have continued with an edited one.
    stages = run_dir.iterdir() if run_dir.is_dir() else ()
    # A link to nothing counts: reading it fails with its name.
    places = [path / RECIPE_FILE for path in stages if os.path.lexists(path / RECIPE_FILE)]
    found = sorted(places, key=lambda path: path.lstat().st_mtime)
    if not found:
        raise ArtifactError(
            f"{run_dir}: no stage found (no */recipe.yaml). Expected a run folder such as "
            "runs/<recipe name>. Start a run with 'align run RECIPE'"
        )
    return read_resolved(found[-1])


def _read_stage(run_dir: Path, recipe: Recipe, name: str, *, problems: list[str]) -> StageRecord:
    spec = recipe.stages[name]
    folder = run_dir / name
    manifest = read_object(folder / MANIFEST, problems)
    metrics = read_lines(folder / METRICS_FILE, problems)
    if manifest:
        same = manifest.get("spec") == spec.model_dump(mode="json")
        status = "done" if same else "changed"
    else:
        status = "unfinished" if folder.is_dir() else "not started"
    needs = tuple(dict.fromkeys(n for n in recipe.inputs(name).values() if n in recipe.stages))
    samples = read_lines(folder / SAMPLES_FILE, problems)
    alarms = read_lines(folder / ALARMS_FILE, problems)
    return StageRecord(name, spec.kind, status, needs, manifest, metrics, samples, alarms)


def _read_summary(run_dir: Path, recipe: Recipe, problems: list[str]) -> Row:
    evaluations = [name for name, spec in recipe.stages.items() if spec.kind == "evaluate"]
    for folder in (run_dir, *(run_dir / name for name in reversed(evaluations))):
        if summary := read_object(folder / "summary.json", problems):
            return summary
    return {}


def own_models(summary: Row) -> Row:
    """Return each model's metrics on the run's own prompts."""
    return summary.get("tasks", {}).get(OWN_TASK, {}).get("models", {})


def read_object(path: Path, problems: list[str]) -> Row:
    """Return a file's JSON object; a missing or invalid file counts as empty.

    Args:
        path: the file.
        problems: an invalid file appends a line here; a missing one does not.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        problems.append(f"{_short(path)}: not valid JSON ({error})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{_short(path)}: expected an object, found {type(found).__name__}")
        return {}
    return found


def read_lines(path: Path, problems: list[str]) -> list[Row]:
    """Return the objects of a jsonl file.

    Args:
        path: the file; a missing file has no lines.
        problems: every line that is not an object appends a line here.
    """
    if not path.is_file():
        return []
    rows: list[Row] = []
    for i, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            # Without a line break it is the last line of a run that is still writing.
            if line.endswith(b"\n"):
                problems.append(f"{_short(path)}:{i}: not valid JSON ({error})")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            problems.append(f"{_short(path)}:{i}: expected an object")
    return rows


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
