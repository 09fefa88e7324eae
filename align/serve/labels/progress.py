"""What the pages show beside the items: progress, batches, snapshots and sources."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.core.errors import AlignError
from align.data.labels import RECORD, snapshot_number, snapshots
from align.serve.auth import Person
from align.serve.labels.items import SAMPLES_FILE, sampled_models
from align.serve.labels.tables import Project


def progress_of(db: sqlite3.Connection, project: Project, person: Person) -> dict[str, int]:
    """Return how many answers a person gave, and how many items are left for this person.

    Annotators of a project with gold or repeated items are not told what is left: the number stays
    the same after such an item, and would tell which ones they are.
    """
    query = (
        "SELECT count(*) FROM label_tasks t JOIN label_annotators a ON a.id = t.annotator_id "
        "WHERE a.project_id = ? AND a.name = ? AND t.state = 'done'"
    )
    (mine,) = db.execute(query, (project.id, person.name)).fetchone()
    if not person.is_admin and (project.gold_rate or project.repeat_rate):
        return {"mine": mine}
    query = "SELECT count(*) FROM label_items WHERE project_id = ? AND open = 1"
    (open_,) = db.execute(query, (project.id,)).fetchone()
    query = (
        "SELECT count(*) FROM label_tasks t JOIN label_annotators a ON a.id = t.annotator_id "
        "JOIN label_items i ON i.id = t.item_id WHERE a.project_id = ? AND a.name = ? "
        "AND t.purpose = 'label' AND t.state != 'shown' AND i.open = 1"
    )
    (seen,) = db.execute(query, (project.id, person.name)).fetchone()
    return {"mine": mine, "left": open_ - seen}


@dataclass(frozen=True, slots=True)
class Batch:
    """The items of one import.

    Attributes:
        name: the file, or the models that were sampled.
        added: date of the import.
        items: those that need labels.
        labeled: those that have all of them.
        gold: items with a known answer.
    """

    name: str
    added: str
    items: int
    labeled: int
    gold: int


def batches(db: sqlite3.Connection, project: Project) -> list[Batch]:
    """Return the imports of a project with their progress, the oldest first."""
    rows = db.execute(
        "SELECT coalesce(b.name, '') AS name, b.created_at, sum(i.gold IS NULL) AS items, "
        "sum(i.gold IS NULL AND i.open = 0) AS labeled, sum(i.gold IS NOT NULL) AS gold "
        "FROM label_items i LEFT JOIN label_batches b ON b.id = i.batch_id "
        "WHERE i.project_id = ? GROUP BY i.batch_id ORDER BY i.batch_id",
        (project.id,),
    )
    return [
        Batch(row["name"], _date(row["created_at"]), row["items"], row["labeled"], row["gold"])
        for row in rows
    ]


def _date(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).date().isoformat()


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
