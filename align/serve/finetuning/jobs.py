"""Jobs: their rows, objects and routes. The queue is in ``queue.py``."""

import json
import secrets
import sqlite3
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.asked import JobRequest
from align.serve.finetuning.common import Api, list_page, new_id, now, owned
from align.serve.finetuning.models import find_place, find_whole
from align.serve.finetuning.retries import once
from align.serve.finetuning.webhooks import announce
from reward_models.grader_specs import GraderError, LabelModel, Multi, ScoreModel, read_grader

UNDER_WAY = ("validating_files", "queued", "running")
ACTIVE = (*UNDER_WAY, "paused")
FROM = {"cancelled": ACTIVE, "paused": UNDER_WAY, "queued": ("paused",)}
"""Statuses from which a client can bring a job to another one."""
ENDED = ("succeeded", "failed", "cancelled")


def job_object(row: sqlite3.Row) -> dict[str, Any]:
    """Return the API's object of a job."""
    asked = json.loads(row["request"])
    method = asked["method"]
    settings = method[method["type"]]
    return {
        "id": row["id"],
        "object": "fine_tuning.job",
        "created_at": row["created_at"],
        "finished_at": row["finished_at"],
        "status": row["status"],
        "model": row["model"],
        "fine_tuned_model": row["fine_tuned_model"],
        "organization_id": f"org-{row['owner']}",
        "result_files": [row["result_file"]] if row["result_file"] else [],
        "seed": row["seed"],
        "training_file": asked["training_file"],
        "validation_file": asked["validation_file"],
        "hyperparameters": settings["hyperparameters"],
        "method": {"type": method["type"], method["type"]: settings},
        "trained_tokens": row["trained_tokens"],
        "estimated_finish": None,
        "integrations": asked["integrations"] or [],
        "metadata": asked["metadata"],
        "error": json.loads(row["error"]) if row["error"] else None,
        "suffix": asked["suffix"],
    }


def add_event(
    db: sqlite3.Connection,
    job: str,
    message: str,
    *,
    level: str = "info",
    data: dict[str, Any] | None = None,
    step: int | None = None,
) -> None:
    """Enter an event of a job; the one of a step only once."""
    db.execute(
        "INSERT OR IGNORE INTO events (id, job, created_at, level, message, type, data, step)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(new_id("ftevent"), job, now(), level, message),
            "message" if step is None else "metrics",
            json.dumps(data) if data else None,
            step,
        ),
    )


def set_status(
    db: sqlite3.Connection, row: sqlite3.Row, status: str, *, message: str, **more: object
) -> None:
    """Change the status of a job, with its event, and its webhooks if it ends.

    Args:
        db: in a transaction of its own.
        row: of the job.
        status: the new one.
        message: of the event.
        more: further columns.
    """
    ends = status in ENDED
    columns = {"status": status, **({"finished_at": now()} if ends else {}), **more}
    changes = ", ".join(f"{name} = ?" for name in columns)
    db.execute(f"UPDATE jobs SET {changes} WHERE id = ?", [*columns.values(), row["id"]])
    level = "error" if status == "failed" else "info"
    add_event(db, row["id"], message, level=level)
    if ends:
        announce(db, row["owner"], event=f"fine_tuning.job.{status}", job=row["id"])


def status_of(db: sqlite3.Connection, job: str) -> str:
    """Return the status of a job as it is now."""
    return db.execute("SELECT status FROM jobs WHERE id = ?", (job,)).fetchone()[0]


def _event_object(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "fine_tuning.job.event",
        "created_at": row["created_at"],
        "level": row["level"],
        "message": row["message"],
        "type": row["type"],
        "data": json.loads(row["data"]) if row["data"] else {},
    }


def _checkpoint_object(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": row["name"],
        "fine_tuning_job_id": row["job"],
        "step_number": row["step"],
        "metrics": json.loads(row["metrics"]),
    }


def _insert_job(api: Api, db: sqlite3.Connection, *, person: Person, asked: JobRequest) -> str:
    """Enter a job whose request is valid; return its id."""
    find_whole(db, api.settings, person, name=asked.model)
    files = {"training_file": asked.training_file, "validation_file": asked.validation_file}
    for param, file in files.items():
        if file is None:
            continue
        query = (
            "SELECT purpose FROM files"
            " WHERE id = ? AND owner = ? AND coalesce(expires_at, 1e18) > ?"
        )
        row = db.execute(query, (file, person.id, now())).fetchone()
        if row is None:
            raise ServeError(400, f"{param}: no such file {file[:100]!r}.", param=param)
        if row["purpose"] != "fine-tune":
            raise ServeError(
                400,
                f"{param}: its purpose is {row['purpose']}; upload it with fine-tune.",
                param=param,
            )
    # In the transaction that enters the job, so that two requests cannot both take the last place.
    query = f"SELECT count(*) FROM jobs WHERE owner = ? AND status IN {ACTIVE}"
    (active,) = db.execute(query, (person.id,)).fetchone()
    if active >= api.settings.jobs_per_token:
        raise ServeError(
            429,
            f"You have {active} unfinished jobs, which is the quota. Wait or cancel some.",
            code="insufficient_quota",
            headers={"x-should-retry": "false"},
        )
    name = new_id("ftjob")
    method = asked.resolved_method()
    request = {**asked.model_dump(), "method": method.model_dump()}
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    db.execute(
        "INSERT INTO jobs (id, owner, created_at, status, model, request, seed)"
        " VALUES (?, ?, ?, 'validating_files', ?, ?, ?)",
        (name, person.id, now(), asked.model, json.dumps(request), seed),
    )
    add_event(db, name, f"Created fine-tuning job: {name}")
    add_event(db, name, f"Validating training file: {asked.training_file}")
    return name


def _check_grader(api: Api, person: Person, asked: JobRequest) -> None:
    """Raise if a job's grader is not valid, or asks a model that its owner may not use."""
    method = asked.method
    if method is None or method.reinforcement is None:
        return
    try:
        grader = read_grader(method.reinforcement.grader)
    except GraderError as error:
        param = "method.reinforcement.grader"
        raise ServeError(400, f"grader: {error}", param=param) from error
    with api.store.read() as db:
        for member in grader.members().values() if isinstance(grader, Multi) else [grader]:
            if isinstance(member, ScoreModel | LabelModel):
                find_place(db, api.settings, person, name=member.model)


def add_jobs(routes: APIRouter, api: Api) -> None:
    """Add the routes that create and show jobs."""
    me = api.me

    @routes.post("/fine_tuning/jobs")
    def create(
        asked: JobRequest, request: Request, person: Annotated[Person, me]
    ) -> dict[str, Any]:
        _check_grader(api, person, asked)

        def make(db: sqlite3.Connection) -> dict[str, Any]:
            name = _insert_job(api, db, person=person, asked=asked)
            return {"id": name}

        made = once(api.store, request, person, asks=asked.model_dump(), make=make)
        api.wake.set()
        with api.store.read() as db:
            return job_object(owned(db, "jobs", person, name=made["id"]))

    @routes.get("/fine_tuning/jobs")
    def list_(
        *,
        request: Request,
        person: Annotated[Person, me],
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> dict[str, Any]:
        where = {"owner": person.id, **_with_metadata(request.query_params)}
        with api.store.read() as db:
            return list_page(db, "jobs", job_object, where=where, after=after, limit=limit)

    @routes.get("/fine_tuning/jobs/{name}")
    def retrieve(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.read() as db:
            return job_object(owned(db, "jobs", person, name=name))


def add_steering(routes: APIRouter, api: Api) -> None:
    """Add the routes that pause, resume and cancel jobs."""
    me = api.me

    def steer(
        name: str, person: Person, *, to: str, done: tuple[str, ...], message: str
    ) -> dict[str, Any]:
        with api.store.write() as db:
            row = owned(db, "jobs", person, name=name)
            if row["status"] not in done:  # a retry finds its work done
                if row["status"] not in (allowed := FROM[to]):
                    raise ServeError(
                        400,
                        f"Job {name} has the status {row['status']}; expected one of "
                        f"{', '.join(allowed)}.",
                        code="invalid_status",
                    )
                was_checked = row["status"] != "validating_files" and not row["unchecked"]
                if to == "queued" and not was_checked:
                    to, message = "validating_files", "Fine-tuning job resumed, validating files"
                set_status(db, row, to, message=message, unchecked=not was_checked)
            answer = job_object(owned(db, "jobs", person, name=name))
        api.wake.set()
        return answer

    @routes.post("/fine_tuning/jobs/{name}/cancel")
    def cancel(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        done = ("cancelled",)
        return steer(name, person, to=done[0], done=done, message="Fine-tuning job canceled")

    @routes.post("/fine_tuning/jobs/{name}/pause")
    def pause(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        done = ("paused",)
        return steer(name, person, to=done[0], done=done, message="Fine-tuning job paused")

    @routes.post("/fine_tuning/jobs/{name}/resume")
    def resume(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        message = "Fine-tuning job resumed, moved to queued state"
        return steer(name, person, to="queued", done=UNDER_WAY, message=message)


def add_details(routes: APIRouter, api: Api) -> None:
    """Add the routes that list events and checkpoints of a job."""
    me = api.me

    @routes.get("/fine_tuning/jobs/{name}/events")
    def events(
        *,
        name: str,
        person: Annotated[Person, me],
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> dict[str, Any]:
        with api.store.read() as db:
            row = owned(db, "jobs", person, name=name)
            where = {"job": row["id"]}
            return list_page(db, "events", _event_object, where=where, after=after, limit=limit)

    @routes.get("/fine_tuning/jobs/{name}/checkpoints")
    def checkpoints(
        *,
        name: str,
        person: Annotated[Person, me],
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 10,
    ) -> dict[str, Any]:
        with api.store.read() as db:
            row = owned(db, "jobs", person, name=name)
            where = {"job": row["id"]}
            return list_page(
                db, "checkpoints", _checkpoint_object, where=where, after=after, limit=limit
            )


def _with_metadata(asked: Mapping[str, str]) -> dict[str, Any]:
    """Return the conditions on jobs, and their values, that a query sets on metadata.

    Raises:
        ServeError: ``metadata`` has a value of its own.
    """
    where: dict[str, Any] = {}
    if (pairs := asked.get("metadata")) not in (None, "null", ""):
        raise ServeError(
            400,
            f"metadata: found {pairs[:100]!r}; expected metadata[KEY]=VALUE, or null for jobs "
            "without any",
            param="metadata",
        )
    if pairs is not None:
        where["json_extract(request, '$.metadata') IS NULL AND ?"] = 1
    for i, (name, value) in enumerate(asked.items()):
        if name.startswith("metadata[") and name.endswith("]"):
            # The key is compared as a value: it is not part of the query. The number keeps
            # several conditions apart.
            condition = (
                f"{i} = {i} AND EXISTS (SELECT 1 FROM json_each(request, '$.metadata') m"
                " WHERE json_array(m.key, m.value) = json(?))"
            )
            where[condition] = json.dumps([name[9:-1], value])
    return where
