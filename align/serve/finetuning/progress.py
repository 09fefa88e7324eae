"""What a job's run has written, as events, checkpoints, results and errors of the API."""

import csv
import io
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from align.core.caret import without_places
from align.core.log import METRICS_FILE
from align.serve.finetuning.common import new_id, now
from align.serve.finetuning.files import Files, insert_file
from align.serve.finetuning.jobs import add_event, set_status
from align.serve.finetuning.recipes import RECIPE, STAGE

COLUMNS = {
    "train_loss": ("train/loss", "policy/loss"),
    "train_accuracy": ("train/accuracy",),
    "valid_loss": ("eval/loss",),
    "valid_accuracy": ("eval/accuracy",),
    "train_reward_mean": ("reward/mean",),
    "valid_reward_mean": ("eval/gold",),
    "learning_rate": ("optim/learning_rate", "policy/learning_rate"),
}
"""Columns of the results: our metrics by the names of the API. The first one that exists counts."""
TOKENS = ("tokens/trained", "tokens/sampled")
"""Tokens of a step: of the rows that an offline stage trains, or of the responses it trains on."""
LOG_LINE = re.compile(r"^\d\d:\d\d:\d\d ")
FAILED = re.compile(r"\S+: failed")
IN_RECIPE = re.compile(rf".*/{re.escape(RECIPE)}(:\d+)*: ")
MAX_ERROR = 1000


def read_steps(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a run's metrics, as far as they are written."""
    try:
        text = (run / STAGE / METRICS_FILE).read_bytes()
    except OSError:
        return
    for line in text.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:  # damaged by a kill; the stage drops it when it resumes
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row


def results_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return one step's metrics by the names of the API."""
    found = {}
    for column, names in COLUMNS.items():
        value = next((row[name] for name in names if name in row), None)
        if isinstance(value, int | float):
            found[column] = value
    return found


def trained_tokens(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the tokens that all steps have trained; None if the run has not counted them."""
    counts = [row[name] for row in rows for name in TOKENS if name in row]
    return round(sum(counts)) if counts else None


def add_metrics(db: sqlite3.Connection, job: str, rows: list[dict[str, Any]]) -> None:
    """Enter the events of steps that have none yet."""
    query = "SELECT coalesce(max(step), -1) FROM events WHERE job = ?"
    (last,) = db.execute(query, (job,)).fetchone()
    for row in rows:
        if row["step"] <= last:
            continue
        data = {"step": row["step"], "total_steps": row.get("total_steps"), **results_of(row)}
        told = ", ".join(f"{k.replace('_', ' ')}={v:.4g}" for k, v in results_of(row).items())
        message = f"Step {row['step']}/{row.get('total_steps', '?')}: {told}"
        add_event(db, job, message, data=data, step=row["step"])


def _add_checkpoint(
    db: sqlite3.Connection, row: sqlite3.Row, found: Mapping[str, Any], *, made: int
) -> None:
    """Enter the checkpoint of a step, with its event."""
    step = found["step"]
    db.execute(
        "INSERT INTO checkpoints (id, job, name, step, metrics, created_at)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            *(new_id("ftckpt"), row["id"], f"{model_name(db, row)}:ckpt-step-{step}"),
            *(step, json.dumps({"step": step, **results_of(found)}), made),
        ),
    )
    add_event(db, row["id"], f"Checkpoint created at step {step}")


def results_csv(rows: list[dict[str, Any]]) -> str:
    """Return the results file: one line per step, and an empty cell where nothing was measured."""
    found = [results_of(row) for row in rows]
    columns = [name for name in COLUMNS if any(name in row for row in found)]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["step", *columns])
    for row, values in zip(rows, found, strict=True):
        writer.writerow([row["step"], *(values.get(name, "") for name in columns)])
    return text.getvalue()


@dataclass(frozen=True, slots=True)
class Results:
    """What a job that has succeeded has made.

    Attributes:
        rows: its metrics, one object a step.
        file: id of the results file, whose content is written.
        size: of that file in bytes.
        saved: steps of the checkpoints that can be served, with the time of each.
    """

    rows: list[dict[str, Any]]
    file: str
    size: int
    saved: Mapping[int, int]


def write_results(run: Path, files: Files, *, saved: Mapping[int, int]) -> Results:
    """Write the results file of a run whose name is its job's; nobody waits for it meanwhile."""
    rows = list(read_steps(run))
    name = f"file-{run.name.removeprefix('ftjob-')}"
    files.path(name).unlink(missing_ok=True)  # of an attempt that was killed here
    text = results_csv(rows).encode()
    size, _, _ = files.write(name, [io.BytesIO(text)], limit=2**40)
    return Results(rows, name, size, saved)


def finish(db: sqlite3.Connection, row: sqlite3.Row, results: Results) -> None:
    """Enter the end of a job that has succeeded, in one transaction."""
    rows, filename, purpose = results.rows, "step_metrics.csv", "fine-tune-results"
    add_metrics(db, row["id"], rows)
    insert_file(
        db, row["owner"], name=results.file, filename=filename, purpose=purpose, size=results.size
    )
    model = model_name(db, row)
    *earlier, last = rows or [{"step": 0}]
    for found in earlier:
        if found["step"] in results.saved:
            _add_checkpoint(db, row, found, made=results.saved[found["step"]])
    _add_checkpoint(db, row, last, made=now())  # the model itself
    add_event(db, row["id"], f"New fine-tuned model created: {model}")
    set_status(
        db,
        row,
        "succeeded",
        message="The job has successfully completed",
        fine_tuned_model=model,
        result_file=results.file,
        trained_tokens=trained_tokens(rows),
    )


def model_name(db: sqlite3.Connection, row: sqlite3.Row) -> str:
    """Return ``ft:BASE:ORG:SUFFIX:ID``, of which no part contains a colon."""
    query = "SELECT name FROM tokens WHERE id = ?"
    (owner,) = db.execute(query, (row["owner"],)).fetchone()
    base = row["model"].split(":")[1] if row["model"].startswith("ft:") else row["model"]
    suffix = json.loads(row["request"])["suffix"] or ""
    parts = (base, owner, suffix, row["id"].removeprefix("ftjob-")[:12])
    return ":".join(["ft", *(re.sub(r"[^A-Za-z0-9_./-]", "-", part) for part in parts)])


def error_of(run: Path, output: Path) -> str:
    """Return why a run has failed: what ``align run`` says about it, or the last line it wrote."""
    lines: list[str] = []
    for path in (output, run / STAGE / "log.txt"):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        if lines := [line.strip("│").rstrip() for line in lines if line.strip(" │")]:
            break
    told = _told(lines) or _refused(lines) or lines[-1:] or ["the run ended without a message"]
    return "\n".join(LOG_LINE.sub("", line.strip()) for line in told)[:MAX_ERROR]


def _refused(lines: Sequence[str]) -> list[str]:
    """Return the last error in the job's recipe, without its file, which is the server's."""
    return [line[found.end() :] for line in lines if (found := IN_RECIPE.match(line))][-1:]


def _told(lines: Sequence[str]) -> list[str]:
    """Return the indented lines below ``STAGE: failed``: a message, or the last line of a log."""
    heads = [i for i, line in enumerate(lines) if FAILED.match(line)]
    if not heads:
        return []
    below = lines[heads[-1] + 1 :]
    told = list(takewhile(lambda line: line.startswith("    "), below))
    # The place of the error is in a recipe that only the server knows.
    return told[-1:] if "; the end of " in lines[heads[-1]] else without_places(told)
