"""What the pages show beside the items: progress, sources, and the recipes that train on labels."""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import AlignError
from align.data.labels import RECORD, snapshot_number, snapshots
from align.recipe.load import load_recipe
from align.recipe.schema import DataSpec, Spec
from align.serve.labels.items import SAMPLES_FILE, sampled_models
from align.serve.labels.tables import Project


def progress_of(db: sqlite3.Connection, project: Project, annotator: str) -> dict[str, int]:
    """Return how many answers an annotator gave, and how many items still need labels."""
    query = (
        "SELECT count(*) FROM label_tasks t JOIN label_annotators a ON a.id = t.annotator_id "
        "WHERE a.project_id = ? AND a.name = ? AND t.state = 'done'"
    )
    (mine,) = db.execute(query, (project.id, annotator)).fetchone()
    query = "SELECT count(*) FROM label_items WHERE project_id = ? AND open = 1"
    (left,) = db.execute(query, (project.id,)).fetchone()
    return {"mine": mine, "left": left}


@dataclass(frozen=True, slots=True)
class Exported:
    """A snapshot as a page shows it.

    Attributes:
        number: as in ``NAME@N``.
        folder: of its files.
        answered: items in it.
        files: rows and sha256 by file.
    """

    number: int
    folder: Path
    answered: int
    files: Mapping[str, Any]


def exported(project: Project) -> list[Exported]:
    """Return the snapshots of a project, the newest first."""
    found = []
    for folder in reversed(snapshots(project.name)):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        number, answered = snapshot_number(folder), record["items"]["answered"]
        found.append(Exported(number, folder, answered, record["files"]))
    return found


def sources(runs: Path) -> list[str]:
    """Return ``RUN/STAGE`` or ``RUN/STAGE:MODEL`` of everything that has sampled responses."""
    found = []
    for path in sorted(runs.glob(f"*/*/{SAMPLES_FILE}")):
        stage = f"{path.parent.parent.name}/{path.parent.name}"
        try:
            models = sampled_models(path.parent)
        except AlignError:  # damaged, or being written
            continue
        found += [f"{stage}:{model}" if model else stage for model in models]
    return found


def recipes_of(project: Project) -> list[Path]:
    """Return the recipes of the current folder that read the labels of a project."""
    found = []
    for path in sorted([*Path().glob("*.yaml"), *Path("recipes").glob("*.yaml")]):
        try:
            # Most recipes have no labels, and reading a text is fast.
            if "labels:" not in path.read_text(encoding="utf-8"):
                continue
            recipe = load_recipe(path)
        except (OSError, ValueError, AlignError):  # not a recipe
            continue
        named = {name.partition("@")[0] for spec in recipe.stages.values() for name in _named(spec)}
        if project.name in named:
            found.append(path)
    return found


def trained(runs: Path, recipe: Path, project: Project) -> list[str]:
    """Return the runs of a recipe that exist: its own, then one for each snapshot."""
    numbers = [snapshot_number(folder) for folder in snapshots(project.name)]
    names = [recipe.stem, *(f"{recipe.stem}-{number}" for number in numbers)]
    return [name for name in names if (runs / name).is_dir()]


def _named(part: object) -> Iterator[str]:
    """Yield the labels that a specification names, at any depth."""
    if isinstance(part, DataSpec) and part.labels is not None:
        yield part.labels
    elif isinstance(part, Spec):
        for name in type(part).model_fields:
            yield from _named(getattr(part, name))
    elif isinstance(part, list):
        for inner in part:
            yield from _named(inner)
