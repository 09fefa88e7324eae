"""The tables of the labels, and the project that a row of them describes."""

import json
import re
import sqlite3
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from align.core.errors import DataError
from align.core.text import suggest

Kind = Literal["pairwise", "thumbs", "steps"]
Queue = Literal["random", "margin", "ensemble"]
MIGRATIONS = (
    """
    CREATE TABLE label_projects (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        settings TEXT NOT NULL,
        created_at REAL NOT NULL
    );
    CREATE TABLE label_items (
        id INTEGER PRIMARY KEY,
        project_id INTEGER NOT NULL REFERENCES label_projects (id),
        key TEXT NOT NULL,
        prompt TEXT NOT NULL,
        responses TEXT NOT NULL,
        models TEXT NOT NULL,
        source TEXT NOT NULL,
        gold TEXT,
        priority REAL NOT NULL,
        position INTEGER NOT NULL,
        open INTEGER NOT NULL,
        UNIQUE (project_id, key)
    );
    CREATE INDEX label_items_queue ON label_items (project_id, open, priority, position);
    CREATE TABLE label_annotators (
        id INTEGER PRIMARY KEY,
        project_id INTEGER NOT NULL REFERENCES label_projects (id),
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        UNIQUE (project_id, name),
        UNIQUE (project_id, number)
    );
    CREATE TABLE label_tasks (
        id INTEGER PRIMARY KEY,
        item_id INTEGER NOT NULL REFERENCES label_items (id),
        annotator_id INTEGER NOT NULL REFERENCES label_annotators (id),
        purpose TEXT NOT NULL CHECK (purpose IN ('label', 'repeat', 'gold')),
        flipped INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('shown', 'done', 'skipped')),
        leased_until REAL NOT NULL,
        sequence INTEGER,
        choice TEXT,
        edit TEXT,
        steps TEXT,
        reasons TEXT,
        seconds REAL,
        done_at REAL,
        UNIQUE (item_id, annotator_id, purpose)
    );
    CREATE INDEX label_tasks_annotator ON label_tasks (annotator_id, state, sequence);
    """,
    """
    CREATE TABLE label_batches (
        id INTEGER PRIMARY KEY,
        project_id INTEGER NOT NULL REFERENCES label_projects (id),
        name TEXT NOT NULL,
        created_at REAL NOT NULL
    );
    ALTER TABLE label_items ADD COLUMN batch_id INTEGER REFERENCES label_batches (id);
    CREATE TABLE label_verdicts (
        item_id INTEGER PRIMARY KEY REFERENCES label_items (id),
        answer TEXT NOT NULL,
        decided_by TEXT NOT NULL,
        decided_at REAL NOT NULL
    );
    CREATE TABLE label_trainings (
        run TEXT PRIMARY KEY,
        project_id INTEGER NOT NULL REFERENCES label_projects (id),
        recipe TEXT NOT NULL,
        snapshot INTEGER NOT NULL
    );
    """,
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
MAX_REASONS = 9
"""Each reason has a digit as its key."""


@dataclass(frozen=True, slots=True)
class Project:
    """One labeling project.

    Attributes:
        name: as in ``labels: NAME`` of a recipe.
        kind: what an annotator does: choose of two responses, rate one, or rate its steps.
        queue: which items come first: random ones, pairs with the smallest reward margin, or pairs
            on whose margin an ensemble of reward models disagrees most.
        wanted: labels of each item, by different annotators.
        gold_rate: fraction of the shown items that have a known answer.
        repeat_rate: fraction of the shown items that the annotator has labeled before.
        reasons: what an annotator can tick besides the answer.
        instructions: shown on the labeling page.
        seed: of the order of the items and of the two sides.
        lease_s: seconds after which an item that was shown goes to somebody else.
        id: number of its row; 0 before it is written.
    """

    name: str
    kind: Kind = "pairwise"
    queue: Queue = "random"
    wanted: int = 1
    gold_rate: float = 0.0
    repeat_rate: float = 0.0
    reasons: tuple[str, ...] = ()
    instructions: str = ""
    seed: int = 0
    lease_s: float = 1800.0
    id: int = 0


def create_project(db: sqlite3.Connection, project: Project) -> Project:
    """Write a new project and return it with its number.

    Raises:
        DataError: a setting is invalid, or the name is taken.
    """
    problem = _problem(project)
    if problem is not None:
        raise DataError(f"labels: {project.name}: {problem}")
    settings = asdict(project)
    for key in ("id", "name"):
        del settings[key]
    query = "INSERT INTO label_projects (name, settings, created_at) VALUES (?, ?, ?)"
    try:
        db.execute(query, (project.name, json.dumps(settings), time.time()))
    except sqlite3.IntegrityError:
        raise DataError(f"labels: {project.name}: this project exists; use another name") from None
    return find_project(db, project.name)


def set_instructions(db: sqlite3.Connection, project: Project, text: str) -> None:
    """Replace the instructions of a project."""
    change = "UPDATE label_projects SET settings = json_set(settings, '$.instructions', ?)"
    db.execute(f"{change} WHERE id = ?", (text, project.id))


def find_project(db: sqlite3.Connection, name: str) -> Project:
    """Return the project of this name.

    Raises:
        DataError: there is none.
    """
    row = db.execute("SELECT * FROM label_projects WHERE name = ?", (name,)).fetchone()
    if row is None:
        known = [row["name"] for row in db.execute("SELECT name FROM label_projects")]
        listed = ", ".join(sorted(known)) or "none"
        raise DataError(
            f"labels: no project '{name[:64]}'; there are: {listed}{suggest(name, known)}"
        )
    return _project_of(row)


def all_projects(db: sqlite3.Connection) -> list[Project]:
    """Return all projects by name."""
    return [_project_of(row) for row in db.execute("SELECT * FROM label_projects ORDER BY name")]


def _project_of(row: sqlite3.Row) -> Project:
    settings: dict[str, Any] = json.loads(row["settings"])
    settings["reasons"] = tuple(settings["reasons"])
    return Project(name=row["name"], id=row["id"], **settings)


def _problem(project: Project) -> str | None:
    """Return what is wrong with a project's settings, or None."""
    reasons = project.reasons
    checks = (
        (
            bool(_NAME.fullmatch(project.name)),
            "expected a name of 1 to 64 letters, digits, '.', '_' and '-'",
        ),
        (project.kind in get_args(Kind), f"kind: expected one of {', '.join(get_args(Kind))}"),
        (project.queue in get_args(Queue), f"queue: expected one of {', '.join(get_args(Queue))}"),
        (
            project.kind == "pairwise" or project.queue == "random",
            f"queue: {project.queue} orders pairs, but the project labels single responses; use "
            "random",
        ),
        (1 <= project.wanted <= 100, f"wanted: found {project.wanted}, expected 1 to 100"),
        (0 <= project.gold_rate <= 0.5, "gold rate: expected 0 to 0.5"),
        (0 <= project.repeat_rate <= 0.5, "repeat rate: expected 0 to 0.5"),
        (
            len(reasons) <= MAX_REASONS and len(set(reasons)) == len(reasons),
            f"reasons: expected up to {MAX_REASONS} different ones",
        ),
        (
            all(r.strip() and len(r) <= 80 and r.isprintable() for r in reasons),
            "reasons: expected texts of 1 to 80 characters",
        ),
        (10 <= project.lease_s <= 7 * 86400, "lease: expected 10 seconds to 7 days"),
    )
    return next((message for valid, message in checks if not valid), None)


def annotator_id(db: sqlite3.Connection, project: Project, name: str) -> int:
    """Return the number of an annotator's row in a project, which is written at the first call."""
    db.execute(
        "INSERT INTO label_annotators (project_id, name, number) SELECT ?1, ?2, "
        "(SELECT count(*) + 1 FROM label_annotators WHERE project_id = ?1) "
        "ON CONFLICT (project_id, name) DO NOTHING",
        (project.id, name),
    )
    query = "SELECT id FROM label_annotators WHERE project_id = ? AND name = ?"
    return cast(int, db.execute(query, (project.id, name)).fetchone()[0])
