"""Train on labels from the browser: a recipe of its own for each snapshot, run by the queue.

Worked example. The labels of ``helpful`` are exported as its snapshot 2, and mine.yaml reads
``labels: helpful``. Then mine-2.yaml is written beside it, which extends mine.yaml, is named mine-2
and reads ``labels: helpful@2``. The queue of the fine-tuning jobs runs it, when a device is free.
"""

import json
import secrets
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.core.errors import AlignError, DataError
from align.core.text import hidden
from align.data.labels import snapshot_number, snapshots
from align.data.reading.provenance import data_specs
from align.recipe.load import load_recipe
from align.recipe.schema import Recipe, Spec
from align.serve.finetuning.common import now
from align.serve.finetuning.jobs import ACTIVE, set_status
from align.serve.finetuning.recipes import literal
from align.serve.finetuning.tables import RECIPE_JOB
from align.serve.labels.tables import Project

NOBODY = "training\ton labels"
"""Owner of the jobs. No token can have this name, so the fine-tuning API shows them to nobody."""


# ---- recipes


@dataclass(frozen=True, slots=True)
class Reader:
    """A recipe that reads the newest labels of a project.

    Attributes:
        path: of its file.
        recipe: its content.
    """

    path: Path
    recipe: Recipe

    def run_of(self, number: int) -> str:
        """Return the name of the run that trains on a snapshot."""
        return f"{self.recipe.name}-{number}"


def readers(project: Project) -> list[Reader]:
    """Return the recipes of the current folder that read the newest labels of a project."""
    found = []
    for path in sorted([*Path().glob("*.yaml"), *Path("recipes").glob("*.yaml")]):
        try:
            # Most recipes have no labels, and reading a text is fast.
            if "labels" not in path.read_text(encoding="utf-8"):
                continue
            recipe = load_recipe(path)
        except (OSError, ValueError, AlignError):  # not a recipe
            continue
        if any(project.name in _labels(spec) for spec in recipe.stages.values()):
            found.append(Reader(path, recipe))
    return found


def _labels(part: object) -> set[str]:
    """Return the labels that a specification names, at any depth."""
    return {spec.labels for spec in data_specs(part) if spec.labels is not None}


def derived(reader: Reader, project: Project, number: int) -> str:
    """Return the text of the recipe that reads a snapshot instead of the newest one."""
    stages = {name: _pinned(spec, project, number) for name, spec in reader.recipe.stages.items()}
    content = {
        "extends": reader.path.name,
        "name": reader.run_of(number),
        "stages": {name: changes for name, changes in stages.items() if changes},
    }
    told = (
        f"# Written by align serve: {reader.path.name} with the labels {project.name}@{number}.\n"
    )
    return told + yaml.safe_dump(hidden(content), sort_keys=False, allow_unicode=True)


def _pinned(part: Spec, project: Project, number: int) -> dict[str, Any]:
    """Return the keys of a specification that change; a list changes as a whole."""
    found: dict[str, Any] = {}
    for name in type(part).model_fields:
        value = getattr(part, name)
        if project.name not in _labels(value):
            continue
        if isinstance(value, Spec):
            found[name] = _pinned(value, project, number)
        else:
            plain = part.model_dump(mode="json", include={name}, exclude_unset=True)[name]
            found[name] = _renamed(literal(plain), project, number)
    return found


def _renamed(plain: object, project: Project, number: int) -> Any:
    if isinstance(plain, list):
        return [_renamed(inner, project, number) for inner in plain]
    if isinstance(plain, dict):
        return {
            key: f"{project.name}@{number}"
            if key == "labels" and value == project.name
            else _renamed(value, project, number)
            for key, value in plain.items()
        }
    return plain


# ---- jobs


@dataclass(frozen=True, slots=True)
class Training:
    """A run on a snapshot that the queue was given.

    Attributes:
        run: name of its folder.
        recipe: path of the recipe that it was made of.
        snapshot: number of the labels.
        status: of its job in the queue, as in ``finetuning.jobs``.
        problem: why it failed; empty if it did not.
    """

    run: str
    recipe: str
    snapshot: int
    status: str
    problem: str

    @property
    def is_active(self) -> bool:
        """Return whether it waits or runs."""
        return self.status in ACTIVE


def write_derived(reader: Reader, project: Project, number: int) -> Path:
    """Write the recipe of a snapshot beside the one that it extends.

    Raises:
        DataError: another file is there.
        RecipeError: the recipe is not valid any more.
    """
    path = reader.path.with_name(f"{reader.run_of(number)}.yaml")
    text = derived(reader, project, number)
    try:
        with path.open("x", encoding="utf-8") as f:
            f.write(text)
    except FileExistsError:
        if path.read_text(encoding="utf-8") != text:
            raise DataError(
                f"{path}: this file exists and differs from the recipe for {project.name}@{number}."
                " Rename or remove it, then train again"
            ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    load_recipe(path)
    return path


def queue_training(
    db: sqlite3.Connection, project: Project, reader: Reader, *, number: int, path: Path
) -> str:
    """Queue the run of a recipe, unless it waits, runs or is done; return its name.

    Raises:
        DataError: another recipe's run has this name.
    """
    run = reader.run_of(number)
    db.execute(
        "INSERT INTO label_trainings (run, project_id, recipe, snapshot) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (run) DO NOTHING",
        (run, project.id, str(reader.path), number),
    )
    kept = db.execute("SELECT * FROM label_trainings WHERE run = ?", (run,)).fetchone()
    if (kept["project_id"], kept["recipe"]) != (project.id, str(reader.path)):
        raise DataError(
            f"{reader.path}: {kept['recipe']} has a run {run} already. Give the recipes different "
            "names"
        )
    job = db.execute("SELECT * FROM jobs WHERE id = ?", (run,)).fetchone()
    if job is None:
        request = {"method": {"type": RECIPE_JOB}, "recipe": str(path.resolve())}
        db.execute(
            "INSERT INTO jobs (id, owner, created_at, status, model, request, seed) "
            "VALUES (?, ?, ?, 'queued', '', ?, 0)",
            (run, _nobody(db), now(), json.dumps(request)),
        )
    elif job["status"] in ("failed", "cancelled"):
        told = "Queued again"
        set_status(db, job, "queued", message=told, attempts=0, error=None, finished_at=None)
    return run


def _nobody(db: sqlite3.Connection) -> int:
    insert = "INSERT INTO tokens (name, hash) VALUES (?, ?) ON CONFLICT DO NOTHING"
    db.execute(insert, (NOBODY, secrets.token_hex(32)))
    return db.execute("SELECT id FROM tokens WHERE name = ?", (NOBODY,)).fetchone()[0]


def stop_training(db: sqlite3.Connection, project: Project, run: str) -> None:
    """Stop a run at its next checkpoint, or take it out of the queue.

    Raises:
        DataError: the project has no such run that waits or runs.
    """
    found = {t.run: t for t in trainings(db, project)}
    if run not in found or not found[run].is_active:
        raise DataError(f"{run[:64]}: no run of {project.name} that waits or runs")
    job = db.execute("SELECT * FROM jobs WHERE id = ?", (run,)).fetchone()
    set_status(db, job, "cancelled", message="Stopped")


def trainings(db: sqlite3.Connection, project: Project) -> list[Training]:
    """Return the runs that the queue was given for a project, the newest first."""
    rows = db.execute(
        "SELECT t.*, j.status, j.error FROM label_trainings t JOIN jobs j ON j.id = t.run "
        "WHERE t.project_id = ? ORDER BY j.seq DESC",
        (project.id,),
    )
    return [
        Training(
            row["run"],
            row["recipe"],
            row["snapshot"],
            row["status"],
            json.loads(row["error"])["message"] if row["error"] else "",
        )
        for row in rows
    ]


def trained(runs: Path, reader: Reader, project: Project) -> list[str]:
    """Return the runs of a recipe that exist: its own, then one for each snapshot."""
    numbers = [snapshot_number(folder) for folder in snapshots(project.name)]
    names = [reader.recipe.name, *(reader.run_of(number) for number in numbers)]
    return [name for name in names if (runs / name).is_dir()]
