"""Read a run folder as far as it has come: what is there, what is missing, what is damaged."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.core.artefacts import MANIFEST
from align.core.errors import ArtefactError
from align.core.log import METRICS_FILE, SAMPLES_FILE
from align.recipe.load import RECIPE_FILE, read_resolved
from align.recipe.schema import Recipe
from align.recipe.schema.evaluate import OWN_TASK

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StageRecord:
    """Hold what one stage has left in its folder.

    ``status`` is ``done``, ``changed`` (done with another specification than the newest recipe
    has), ``unfinished`` or ``not started``.
    """

    name: str
    kind: str
    status: str
    needs: tuple[str, ...]
    manifest: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """Give the wall time: of the finished stage, else of what is logged so far."""
        if "seconds" in self.manifest:
            return self.manifest["seconds"]
        return self.metrics[-1].get("time_s") if self.metrics else None


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Hold a run: its recipe, its stages in recipe order, its summary and what is wrong with it."""

    directory: Path
    recipe: Recipe
    stages: list[StageRecord]
    summary: Row
    problems: list[str]


def read_run(run_dir: Path) -> RunRecord:
    """Read a run folder without verifying hashes; a half-finished run is read as far as it is.

    Raises:
        ArtefactError: there is no stage in the folder.
    """
    problems: list[str] = []
    recipe = _newest_recipe(run_dir)
    stages = [_read_stage(run_dir, recipe, name, problems) for name in recipe.stages]
    summary = _read_summary(run_dir, recipe, problems)
    return RunRecord(run_dir, recipe, stages, summary, problems)


def _newest_recipe(run_dir: Path) -> Recipe:
    found = sorted(run_dir.glob(f"*/{RECIPE_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ArtefactError(
            f"{run_dir}: no stage found (no */recipe.yaml); expected a run folder such as "
            "runs/<recipe name>; start one with 'align run RECIPE'"
        )
    return read_resolved(found[-1])


def _read_stage(run_dir: Path, recipe: Recipe, name: str, problems: list[str]) -> StageRecord:
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
    return StageRecord(name, spec.kind, status, needs, manifest, metrics, samples)


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
    """Read a JSON object; a file that is not there is an empty one, and ``problems`` is told."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        problems.append(f"{_short(path)}: not valid JSON ({error})")
        return {}
    if not isinstance(found, dict):
        problems.append(f"{_short(path)}: expected an object, found {type(found).__name__}")
        return {}
    return found


def read_lines(path: Path, problems: list[str]) -> list[Row]:
    """Read a jsonl file of objects; a half-written last line belongs to a run that goes on.

    Args:
        path: the file; one that is not there has no lines.
        problems: is told of every other line that is no object.
    """
    if not path.is_file():
        return []
    rows: list[Row] = []
    for i, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
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
