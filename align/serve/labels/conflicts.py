"""Items whose labels disagree, and the verdicts with which an admin decides them."""

import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from align.core.errors import DataError
from align.core.types import Text
from align.serve.labels.items import ANSWERS
from align.serve.labels.quality import canonical, majority, pseudonym
from align.serve.labels.tables import Project

_VOTES = (
    "SELECT t.*, i.prompt, i.responses, a.number, v.answer, v.decided_by "
    "FROM label_tasks t JOIN label_items i ON i.id = t.item_id "
    "JOIN label_annotators a ON a.id = t.annotator_id "
    "LEFT JOIN label_verdicts v ON v.item_id = i.id "
    "WHERE i.project_id = ? AND i.open = 0 AND t.purpose = 'label' AND t.state = 'done' "
    "ORDER BY i.id, a.number"
)


@dataclass(frozen=True, slots=True)
class Vote:
    """One label of an item.

    Attributes:
        annotator: the pseudonym.
        answer: independent of the order shown.
        reasons: those that were ticked.
        edit: the improved response, or None.
    """

    annotator: str
    answer: str
    reasons: tuple[str, ...]
    edit: str | None


@dataclass(frozen=True, slots=True)
class Conflict:
    """An item that has all its labels, of which at least two differ, or that was decided.

    Attributes:
        item: number of the item.
        prompt: of the responses.
        responses: a and b of a pair, one response, or its steps.
        votes: the labels.
        majority: the answer with more votes than any other; None without one.
        verdict: the answer that was decided; None without one.
        decided_by: who decided it; None without a verdict.
    """

    item: int
    prompt: Text
    responses: tuple[Text, ...]
    votes: tuple[Vote, ...]
    majority: str | None
    verdict: str | None
    decided_by: str | None

    @property
    def is_open(self) -> bool:
        """Return whether the export leaves the item out."""
        return self.majority is None and self.verdict is None

    @property
    def choices(self) -> list[str]:
        """Return the answers that annotators gave, without repetitions."""
        return sorted({vote.answer for vote in self.votes})


def conflicts(db: sqlite3.Connection, project: Project) -> list[Conflict]:
    """Return the items whose labels differ: without an answer first, the decided ones last.

    A decided item stays among them if an annotator undoes a label and then agrees with the others:
    the verdict still counts.
    """
    items: defaultdict[int, list[sqlite3.Row]] = defaultdict(list)
    for row in db.execute(_VOTES, (project.id,)):
        items[row["item_id"]].append(row)
    found = [
        _conflict(rows)
        for rows in items.values()
        if rows[0]["answer"] is not None or len({canonical(row) for row in rows}) > 1
    ]
    return sorted(found, key=lambda c: (not c.is_open, c.verdict is not None, c.item))


def _conflict(rows: Sequence[sqlite3.Row]) -> Conflict:
    votes = tuple(
        Vote(pseudonym(r["number"]), canonical(r), tuple(json.loads(r["reasons"])), r["edit"])
        for r in rows
    )
    first = rows[0]
    return Conflict(
        item=first["item_id"],
        prompt=json.loads(first["prompt"]),
        responses=tuple(json.loads(first["responses"])),
        votes=votes,
        majority=majority([vote.answer for vote in votes]),
        verdict=first["answer"],
        decided_by=first["decided_by"],
    )


def decide(
    db: sqlite3.Connection, project: Project, item: int, *, answer: str, decided_by: str
) -> None:
    """Record the verdict on an item, which replaces an earlier one; an empty answer removes it.

    Raises:
        DataError: the item has no conflict, or nothing of that kind can be its answer.
    """
    conflict = next((c for c in conflicts(db, project) if c.item == item), None)
    if conflict is None:
        raise DataError(f"item {item}: its labels do not differ, so there is nothing to decide")
    if not answer:
        db.execute("DELETE FROM label_verdicts WHERE item_id = ?", (item,))
        return
    expected = ANSWERS.get(project.kind, conflict.choices)
    if answer not in expected:
        raise DataError(
            f"item {item}: found {answer[:40]!r}, expected one of {', '.join(expected)}"
        )
    db.execute(
        "INSERT INTO label_verdicts (item_id, answer, decided_by, decided_at) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (item_id) DO UPDATE SET answer = excluded.answer, "
        "decided_by = excluded.decided_by, decided_at = excluded.decided_at",
        (item, answer, decided_by, time.time()),
    )


def verdicts(db: sqlite3.Connection, project: Project) -> dict[int, str]:
    """Return the verdict on each item that has one."""
    query = (
        "SELECT v.item_id, v.answer FROM label_verdicts v JOIN label_items i ON i.id = v.item_id "
        "WHERE i.project_id = ?"
    )
    return dict(map(tuple, db.execute(query, (project.id,))))
