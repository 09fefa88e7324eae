"""Every single label as a table, for a spreadsheet or an analysis."""

import csv
import io
import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from align.serve.labels.items import plain_text
from align.serve.labels.quality import canonical, pseudonym
from align.serve.labels.tables import Project

COLUMNS = (
    *("item", "batch", "from", "prompt", "response_a", "response_b", "model_a", "model_b"),
    *("purpose", "known_answer", "annotator", "answer", "order", "edit", "reasons"),
    *("verdict", "seconds", "at"),
)
_ALL = (
    "SELECT t.*, i.key, i.prompt, i.responses, i.models, i.source, i.gold, a.number, "
    "b.name AS batch, v.answer AS verdict FROM label_tasks t "
    "JOIN label_items i ON i.id = t.item_id JOIN label_annotators a ON a.id = t.annotator_id "
    "LEFT JOIN label_batches b ON b.id = i.batch_id "
    "LEFT JOIN label_verdicts v ON v.item_id = i.id "
    "WHERE i.project_id = ? AND t.state = 'done' ORDER BY t.done_at, t.id"
)
# The wide forms count as the narrow ones in spreadsheets of some languages.
_FORMULA = (*"=+-@", *"\uff1d\uff0b\uff0d\uff20", "\t", "\r", "\n", "\0")


def votes_of(db: sqlite3.Connection, project: Project) -> Iterator[dict[str, Any]]:
    """Yield a row for every label, gold and repeated ones included, in the order of their time."""
    for row in db.execute(_ALL, (project.id,)):
        responses = json.loads(row["responses"])
        models = json.loads(row["models"])
        if project.kind == "steps":
            responses = ["\n".join(responses)]
        yield {
            "item": row["key"][:12],
            "batch": row["batch"] or "",
            "from": row["source"],
            "prompt": json.loads(row["prompt"]),
            "response_a": responses[0],
            "response_b": responses[1] if len(responses) > 1 else None,
            "model_a": models[0] if models else None,
            "model_b": models[1] if len(models) > 1 else None,
            "purpose": row["purpose"],
            "known_answer": row["gold"],
            "annotator": pseudonym(row["number"]),
            "answer": canonical(row),
            "order": ("ba" if row["flipped"] else "ab") if project.kind == "pairwise" else None,
            "edit": row["edit"],
            "reasons": json.loads(row["reasons"]),
            "verdict": row["verdict"],
            "seconds": round(row["seconds"], 2),
            "at": datetime.fromtimestamp(row["done_at"], UTC).isoformat(timespec="seconds"),
        }


def votes_text(db: sqlite3.Connection, project: Project, suffix: str) -> str:
    """Return all labels as ``csv`` or ``jsonl``.

    In CSV, a conversation is the text of its turns, and a text that a spreadsheet would run as a
    formula begins with an apostrophe.
    """
    rows = votes_of(db, project)
    if suffix == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([_cell(row[name]) for name in COLUMNS] for row in rows)
    return text.getvalue()


def _cell(value: object) -> str | float:
    if isinstance(value, float):
        return value
    if isinstance(value, list):
        turns = bool(value) and isinstance(value[0], dict)
        value = plain_text(value) if turns else "; ".join(map(str, value))
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
