"""Which item an annotator sees next, and what happens to the answer.

A task is one item shown to one annotator. It is leased: until the lease ends, nobody else gets the
item instead. Every change is one transaction, so a task is shown, done or skipped, and nothing
between.
"""

import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from align.core.errors import DataError
from align.core.types import Text
from align.serve.labels.items import plain_text
from align.serve.labels.tables import Project, annotator_id

CHOICES = {
    "pairwise": ("left", "right", "tie", "bad"),
    "thumbs": ("good", "bad"),
    "steps": ("steps",),
}
"""Answers of each kind of project, as the annotator sees them."""
MAX_AHEAD = 4
"""Tasks that one annotator has open at most: the one on the screen and those loaded in advance."""
REPEAT_GAP = 5
"""Answers between the first label of an item and its repetition, at least."""
MAX_EDIT = 100_000
"""Characters of an edited response."""


class TaskGone(DataError):
    """A task whose lease has ended and whose item others have labeled since, or an unknown one."""


@dataclass(frozen=True, slots=True)
class Task:
    """What the labeling page shows.

    Attributes:
        id: number of the task.
        prompt: of the responses.
        responses: in the order shown: left and right of a pair, one response, or its steps.
    """

    id: int
    prompt: Text
    responses: tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an annotator says about a task.

    Attributes:
        choice: one of the kind's ``CHOICES``.
        edit: improved text of the response that was chosen.
        steps: whether each step is correct.
        reasons: those of the project's reasons that apply.
        seconds: from showing the task to the answer.
    """

    choice: str
    edit: str | None = None
    steps: tuple[bool, ...] | None = None
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0


def next_task(
    db: sqlite3.Connection, project: Project, annotator: str, *, beside: Collection[int] = ()
) -> Task | None:
    """Return the task that an annotator does next, leased to this annotator.

    Args:
        db: inside a transaction that may write.
        project: of the task.
        annotator: name of the annotator.
        beside: tasks that the annotator has on the screen or in advance already.

    Returns:
        None if no item needs a label of this annotator now.
    """
    who = annotator_id(db, project, annotator)
    now = time.time()
    mine = _renewed(db, project, who=who, now=now)
    waiting = next((task for task in mine if task not in beside), None)
    if waiting is None and len(mine) < MAX_AHEAD:
        waiting = _allocate(db, project, who=who, now=now)
    return None if waiting is None else read_task(db, waiting)


def read_task(db: sqlite3.Connection, task_id: int) -> Task:
    """Return a task as it is shown, without anything that tells where a response is from."""
    row = db.execute(
        "SELECT t.id, t.flipped, i.prompt, i.responses FROM label_tasks t "
        "JOIN label_items i ON i.id = t.item_id WHERE t.id = ?",
        (task_id,),
    ).fetchone()
    responses = tuple(json.loads(row["responses"]))
    if row["flipped"]:
        responses = responses[::-1]
    return Task(row["id"], json.loads(row["prompt"]), responses)


def _renewed(db: sqlite3.Connection, project: Project, *, who: int, now: float) -> list[int]:
    """Return the annotator's open tasks with new leases, without those that others have done."""
    kept = []
    query = (
        "SELECT id, item_id, purpose FROM label_tasks "
        "WHERE annotator_id = ? AND state = 'shown' ORDER BY id"
    )
    for row in db.execute(query, (who,)).fetchall():
        if row["purpose"] == "label" and not _has_room(
            db, project, row["item_id"], who=who, now=now
        ):
            db.execute("DELETE FROM label_tasks WHERE id = ?", (row["id"],))
        else:
            kept.append(row["id"])
    lease = "UPDATE label_tasks SET leased_until = ? WHERE annotator_id = ? AND state = 'shown'"
    db.execute(lease, (now + project.lease_s, who))
    return kept


_TAKEN = (
    "(SELECT count(*) FROM label_tasks o WHERE o.item_id = {item} AND o.purpose = 'label' "
    "AND o.annotator_id != :who "
    "AND (o.state = 'done' OR (o.state = 'shown' AND o.leased_until > :now"
    " AND o.leased_until < :now + 2 * :lease)))"
)
"""Labels of an item that other annotators have given or are giving.

A lease that ends much later than any does was given while the clock was ahead, and counts no more.
"""
_UNSEEN = (
    "SELECT i.id, i.key FROM label_items i WHERE i.project_id = :project AND i.open = 1 "
    "AND NOT EXISTS (SELECT 1 FROM label_tasks t WHERE t.item_id = i.id "
    "AND t.annotator_id = :who AND t.purpose = 'label') "
    f"AND {_TAKEN.format(item='i.id')} < :wanted "
    "ORDER BY i.priority, i.position LIMIT 1"
)
_GOLD = (
    "SELECT i.id, i.key FROM label_items i WHERE i.project_id = :project AND i.gold IS NOT NULL "
    "AND NOT EXISTS (SELECT 1 FROM label_tasks t WHERE t.item_id = i.id "
    "AND t.annotator_id = :who) ORDER BY i.position LIMIT 1"
)
_REPEAT = (
    "SELECT i.id, i.key FROM label_tasks t JOIN label_items i ON i.id = t.item_id "
    "WHERE t.annotator_id = :who AND t.purpose = 'label' AND t.state = 'done' "
    "AND t.sequence <= (SELECT max(sequence) FROM label_tasks WHERE annotator_id = :who) - :gap "
    "AND NOT EXISTS (SELECT 1 FROM label_tasks r WHERE r.item_id = t.item_id "
    "AND r.annotator_id = :who AND r.purpose = 'repeat') ORDER BY t.sequence LIMIT 1"
)


def _has_room(db: sqlite3.Connection, project: Project, item: int, *, who: int, now: float) -> bool:
    """Return whether an item needs a label besides those of the other annotators."""
    given = {"item": item, "who": who, "now": now, "lease": project.lease_s}
    (taken,) = db.execute(f"SELECT {_TAKEN.format(item=':item')}", given).fetchone()
    return taken < project.wanted


def _allocate(db: sqlite3.Connection, project: Project, *, who: int, now: float) -> int | None:
    """Lease an item to an annotator: usually the first that needs a label."""
    given = {"project": project.id, "who": who, "wanted": project.wanted}
    given |= {"now": now, "lease": project.lease_s}
    row = db.execute(_UNSEEN, given).fetchone()
    if row is None:
        return None
    purpose = "label"
    # Gold and repeated items come between the others, by a draw for each task.
    (count,) = db.execute(
        "SELECT count(*) FROM label_tasks WHERE annotator_id = ?", (who,)
    ).fetchone()
    draw = _uniform(f"{project.seed}/mix/{who}/{count}")
    if draw < project.gold_rate:
        gold = db.execute(_GOLD, given).fetchone()
        row, purpose = (gold, "gold") if gold else (row, "label")
    elif draw < project.gold_rate + project.repeat_rate:
        again = db.execute(_REPEAT, given | {"gap": REPEAT_GAP}).fetchone()
        row, purpose = (again, "repeat") if again else (row, "label")
    flipped = project.kind == "pairwise" and (
        _uniform(f"{project.seed}/side/{who}/{row['key']}/{purpose}") < 0.5
    )
    made = db.execute(
        "INSERT INTO label_tasks (item_id, annotator_id, purpose, flipped, state, leased_until) "
        "VALUES (?, ?, ?, ?, 'shown', ?)",
        (row["id"], who, purpose, flipped, now + project.lease_s),
    )
    return made.lastrowid


def _uniform(text: str) -> float:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


# ---- answers


def record_answer(
    db: sqlite3.Connection, project: Project, annotator: str, *, task: int, answer: Answer
) -> None:
    """Record the answer to a task; the same answer sent twice counts once.

    Raises:
        DataError: the answer does not fit the task, or another one is recorded.
        TaskGone: the task is nobody's or somebody else's, or others have labeled its item since.
    """
    row = _own_task(db, project, annotator, task=task)
    given = _checked(project, row, answer)
    if row["state"] != "shown":
        same = ("choice", "edit", "steps", "reasons")
        if row["state"] == "done" and all(row[name] == given[name] for name in same):
            return
        raise DataError(f"task {task}: it is {row['state']} already; undo that first")
    _close(db, project, row, state="done", given=given)


def skip(db: sqlite3.Connection, project: Project, annotator: str, *, task: int) -> None:
    """Leave a task to others; the annotator does not see the item again.

    Raises:
        DataError: the task is labeled.
        TaskGone: the task is nobody's or somebody else's, or others have labeled its item since.
    """
    row = _own_task(db, project, annotator, task=task)
    if row["state"] == "done":
        raise DataError(f"task {task}: it is labeled already; undo that first")
    if row["state"] == "shown":
        _close(db, project, row, state="skipped", given={})


def undo(db: sqlite3.Connection, project: Project, annotator: str) -> Task | None:
    """Undo an annotator's last answer or skip and return its task, or None if there is none."""
    who = annotator_id(db, project, annotator)
    query = (
        "SELECT * FROM label_tasks WHERE annotator_id = ? AND state != 'shown' "
        "ORDER BY sequence DESC LIMIT 1"
    )
    row = db.execute(query, (who,)).fetchone()
    if row is None:
        return None
    now = time.time()
    if row["purpose"] == "label" and not _has_room(db, project, row["item_id"], who=who, now=now):
        raise TaskGone("Others have labeled the item that you skipped; it needs no more labels.")
    db.execute(
        "UPDATE label_tasks SET state = 'shown', leased_until = ?, sequence = NULL, choice = NULL, "
        "edit = NULL, steps = NULL, reasons = NULL, seconds = NULL, done_at = NULL WHERE id = ?",
        (now + project.lease_s, row["id"]),
    )
    _count_labels(db, project, row["item_id"])
    return read_task(db, row["id"])


def _own_task(
    db: sqlite3.Connection, project: Project, annotator: str, *, task: int
) -> sqlite3.Row:
    row = db.execute(
        "SELECT t.*, i.responses, i.project_id FROM label_tasks t "
        "JOIN label_items i ON i.id = t.item_id "
        "JOIN label_annotators a ON a.id = t.annotator_id "
        "WHERE t.id = ? AND a.name = ? AND i.project_id = ?",
        (task, annotator, project.id),
    ).fetchone()
    if row is None:
        raise TaskGone("This task is not yours any more. The next one is shown.")
    return row


def _checked(project: Project, row: sqlite3.Row, answer: Answer) -> dict[str, Any]:
    """Return the columns of an answer.

    Raises:
        DataError: the answer does not fit.
    """
    where = f"task {row['id']}"
    if answer.choice not in CHOICES[project.kind]:
        expected = ", ".join(CHOICES[project.kind])
        raise DataError(f"{where}: found {answer.choice[:20]!r}, expected one of {expected}")
    shown = json.loads(row["responses"])[:: -1 if row["flipped"] else 1]
    if answer.edit is not None:
        if answer.choice not in ("left", "right"):
            raise DataError(f"{where}: choose the better response before you edit it")
        before = plain_text(shown[0 if answer.choice == "left" else 1])
        if not answer.edit.strip() or answer.edit == before or len(answer.edit) > MAX_EDIT:
            raise DataError(
                f"{where}: the edited response is empty, unchanged or longer than {MAX_EDIT}"
            )
    if project.kind == "steps" and len(answer.steps or ()) != len(shown):
        raise DataError(f"{where}: {len(answer.steps or ())} labels for {len(shown)} steps")
    unknown = [reason for reason in answer.reasons if reason not in project.reasons]
    if unknown or (answer.steps is not None and project.kind != "steps"):
        raise DataError(f"{where}: unknown reasons {unknown[:3]}, or steps of a response without")
    if not math.isfinite(answer.seconds) or answer.seconds < 0:
        raise DataError(f"{where}: seconds: expected a number of at least 0")
    return {
        "choice": answer.choice,
        "edit": answer.edit,
        "steps": None if answer.steps is None else json.dumps(answer.steps),
        # In the project's order, so that the order of the ticks does not matter.
        "reasons": json.dumps([r for r in project.reasons if r in answer.reasons]),
        "seconds": answer.seconds,
    }


def _close(
    db: sqlite3.Connection, project: Project, row: sqlite3.Row, *, state: str, given: dict[str, Any]
) -> None:
    """Record how a task ends, unless others have taken the item after the lease ended."""
    now, who = time.time(), row["annotator_id"]
    if row["purpose"] == "label" and not _has_room(db, project, row["item_id"], who=who, now=now):
        db.execute("DELETE FROM label_tasks WHERE id = ?", (row["id"],))
        raise TaskGone("The time for this item was over and others have labeled it.")
    columns = "".join(f", {name} = :{name}" for name in given)
    db.execute(
        f"UPDATE label_tasks SET state = :state, done_at = :now{columns}, sequence = "
        "(SELECT coalesce(max(sequence), 0) + 1 FROM label_tasks WHERE annotator_id = :who) "
        "WHERE id = :id",
        {**given, "state": state, "now": now, "who": who, "id": row["id"]},
    )
    _count_labels(db, project, row["item_id"])


def _count_labels(db: sqlite3.Connection, project: Project, item: int) -> None:
    """Close an item that has all its labels, or open it again."""
    db.execute(
        "UPDATE label_items SET open = (SELECT count(*) FROM label_tasks WHERE item_id = ?1 "
        "AND purpose = 'label' AND state = 'done') < ?2 WHERE id = ?1 AND gold IS NULL",
        (item, project.wanted),
    )
