"""Labels as rows for the next stage: one answer per item, with every vote beside it.

| answer | preference | unpaired | sft |
|---|---|---|---|
| a is better | a over b | a good, b bad | |
| a is better, edited | a over b, and the edit over a | the edit good, b bad | the edit |
| tie | ties.jsonl only | | |
| both bad | | a bad, b bad | |
| good | | good | the response |
| bad | | bad | |

Steps become rows of steps. An item counts once it has all the labels that the project wants. Its
answer is the verdict of an admin, or the one with more votes than any other; without either, the
item is contested and left out.
"""

import fcntl
import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.core.types import Text, Turn
from align.data.labels import FILES, TIES_FILE, write_snapshot
from align.serve.labels.conflicts import verdicts
from align.serve.labels.quality import canonical, majority, pseudonym
from align.serve.labels.tables import Project, find_project
from align.serve.store import Store

EXPORT_LOCK = "export.lock"
Rows = dict[str, list[dict[str, Any]]]
PREFERENCE, UNPAIRED, SFT, STEPS = (FILES[n] for n in ("preference", "unpaired", "sft", "steps"))
_LABELS = (
    "SELECT t.*, i.prompt, i.responses, i.models, i.source, a.number FROM label_tasks t "
    "JOIN label_items i ON i.id = t.item_id JOIN label_annotators a ON a.id = t.annotator_id "
    "WHERE i.project_id = ? AND t.purpose = 'label' AND t.state = 'done' "
    "ORDER BY i.key, a.number"
)


def export_newest(store: Store, name: str) -> Path:
    """Write the labels of a project as its newest snapshot, and return its folder.

    Labels are recorded meanwhile. Of several exports, also by other processes, each begins to read
    when the one before is written, so that the newest snapshot has the newest labels.

    Raises:
        DataError: as ``export``, or there is no such project.
    """
    with (store.path.parent / EXPORT_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with store.read() as db:
            return export(db, find_project(db, name))


def export(db: sqlite3.Connection, project: Project) -> Path:
    """Write the labels of a project as a snapshot, and return its folder.

    The same labels give the same bytes, and the snapshot that exists.

    Raises:
        DataError: no item has all its labels.
    """
    rows, counts = export_rows(db, project)
    if not counts["answered"]:
        raise DataError(
            f"labels: {project.name}: nothing to export, because no item has an answer by "
            f"{project.wanted} of {project.wanted} annotators yet"
        )
    settings = asdict(project)
    for key in ("id", "name"):
        del settings[key]
    return write_snapshot(project.name, rows, {"settings": settings, "items": counts})


def export_rows(db: sqlite3.Connection, project: Project) -> tuple[Rows, dict[str, int]]:
    """Return the rows of each file, and how many items were answered, contested and unfinished.

    Of the answered ones, ``decided`` are the verdicts of an admin; without any it is not there.
    """
    items: defaultdict[int, list[sqlite3.Row]] = defaultdict(list)
    for row in db.execute(_LABELS, (project.id,)):
        items[row["item_id"]].append(row)
    rows: Rows = defaultdict(list)
    counts = {"answered": 0, "contested": 0, "unfinished": 0}
    decided = verdicts(db, project)
    for item, labels in items.items():
        if len(labels) < project.wanted:
            counts["unfinished"] += 1
            continue
        verdict = decided.get(item)
        answer = verdict or majority([canonical(label) for label in labels])
        if answer is None:
            counts["contested"] += 1
            continue
        counts["answered"] += 1
        marked = {}
        if verdict is not None:
            counts["decided"] = counts.get("decided", 0) + 1
            marked = {"decided": True}
        for file, row in _WRITERS[project.kind](answer, labels):
            rows[file].append(row | marked)
    return dict(rows), counts


_Written = Iterator[tuple[str, dict[str, Any]]]


def _pair_rows(answer: str, labels: Sequence[sqlite3.Row]) -> _Written:
    first = labels[0]
    sides: dict[str, Text] = dict(zip("ab", json.loads(first["responses"]), strict=True))
    models = dict(zip("ab", json.loads(first["models"]), strict=False))
    about = _about(labels, ordered=True)
    prompt = about["prompt"]

    def pair(chosen: str, rejected: str, **more: object) -> dict[str, Any]:
        named = {"chosen": models[chosen], "rejected": models[rejected]} if models else {}
        return {
            **about,
            "chosen": _response(prompt, sides[chosen]),
            "rejected": _response(prompt, sides[rejected]),
            **({"models": named} if named else {}),
            **more,
        }

    def rated(side: str, label: bool) -> dict[str, Any]:
        return about | {
            "completion": _response(prompt, sides[side]),
            "label": label,
            **({"model": models[side]} if models else {}),
        }

    if answer == "tie":
        yield TIES_FILE, pair("a", "b", tie=True)
    elif answer == "bad":
        yield UNPAIRED, rated("a", False)
        yield UNPAIRED, rated("b", False)
    else:
        other = "b" if answer == "a" else "a"
        yield PREFERENCE, pair(answer, other)
        # An edited response is better than the one it was made from, and the best that is known.
        edits = [
            _response(prompt, _edited(sides[answer], label["edit"]))
            for label in labels
            if label["edit"] is not None and canonical(label) == answer
        ]
        for edit in edits:
            better = _response(prompt, sides[answer])
            yield PREFERENCE, about | {"chosen": edit, "rejected": better, "edited": True}
            yield UNPAIRED, about | {"completion": edit, "label": True, "edited": True}
            yield SFT, about | {"completion": edit, "edited": True}
        if not edits:
            yield UNPAIRED, rated(answer, True)
        yield UNPAIRED, rated(other, False)


def _thumb_rows(answer: str, labels: Sequence[sqlite3.Row]) -> _Written:
    about = _about(labels)
    models = json.loads(labels[0]["models"])
    about |= {"completion": _response(about["prompt"], json.loads(labels[0]["responses"])[0])}
    about |= {"model": models[0]} if models else {}
    yield UNPAIRED, about | {"label": answer == "good"}
    if answer == "good":
        yield SFT, about


def _step_rows(answer: str, labels: Sequence[sqlite3.Row]) -> _Written:
    texts = json.loads(labels[0]["responses"])
    steps = [
        {"text": text, "label": label}
        for text, label in zip(texts, json.loads(answer), strict=True)
    ]
    yield STEPS, _about(labels) | {"steps": steps}


_WRITERS: Mapping[str, Callable[[str, Sequence[sqlite3.Row]], _Written]] = {
    "pairwise": _pair_rows,
    "thumbs": _thumb_rows,
    "steps": _step_rows,
}


def _about(labels: Sequence[sqlite3.Row], *, ordered: bool = False) -> dict[str, Any]:
    """Return the prompt of an item, its place of origin, and every vote.

    Args:
        labels: of the item.
        ordered: the votes tell in which order the two responses were shown.
    """
    votes = [_vote(label) for label in labels]
    if ordered:
        for vote, label in zip(votes, labels, strict=True):
            vote["order"] = "ba" if label["flipped"] else "ab"
    prompt = json.loads(labels[0]["prompt"])
    return {"prompt": prompt, "from": labels[0]["source"], "votes": votes}


def _vote(label: sqlite3.Row) -> dict[str, Any]:
    return {
        "annotator": pseudonym(label["number"]),
        "answer": canonical(label),
        "at": datetime.fromtimestamp(label["done_at"], UTC).isoformat(timespec="seconds"),
        "seconds": round(label["seconds"], 2),
        "reasons": json.loads(label["reasons"]),
    }


def _response(prompt: Text, response: Text) -> Text:
    """Return a response as turns if its prompt is a conversation, as the formats expect."""
    if isinstance(prompt, str) or not isinstance(response, str):
        return response
    return [Turn(role="assistant", content=response)]


def _edited(response: Text, edit: str) -> Text:
    """Return a response with the text of an edit, which replaces all its turns."""
    return edit if isinstance(response, str) else [Turn(role="assistant", content=edit)]
