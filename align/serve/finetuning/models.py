"""Models: the bases that the server was started with, and what its jobs made of them."""

import sqlite3
from typing import Annotated, Any

from fastapi import APIRouter

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.adapters import Place, trained_place, whole_place
from align.serve.finetuning.common import Api, now
from align.serve.finetuning.recipes import base_place
from align.serve.settings import Settings

STARTED = now()


def find_trained(db: sqlite3.Connection, person: Person, name: str) -> sqlite3.Row | None:
    """Return the job of a fine-tuned model or checkpoint that a person may use.

    It has the further columns ``checkpoint_step``, None for the model itself and for the last
    checkpoint, which is the same, and ``made_at``.
    """
    row = db.execute(
        "SELECT j.*, coalesce(c.created_at, j.finished_at) AS made_at,"
        " CASE WHEN c.step < (SELECT max(step) FROM checkpoints WHERE job = j.id) THEN c.step END"
        " AS checkpoint_step"
        " FROM jobs j LEFT JOIN checkpoints c ON c.job = j.id AND c.name = ?"
        " WHERE (j.fine_tuned_model = ? OR c.name = ?) AND j.deleted = 0"
        " AND j.status = 'succeeded'"
        " AND (j.owner = ? OR EXISTS (SELECT 1 FROM permissions p WHERE p.project = ?"
        "      AND (p.checkpoint = c.name OR (c.name IS NULL AND p.checkpoint IN"
        "       (SELECT name FROM checkpoints WHERE job = j.id ORDER BY step DESC LIMIT 1)))))",
        (name, name, name, person.id, person.name),
    ).fetchone()
    return row


def find_place(db: sqlite3.Connection, settings: Settings, person: Person, *, name: str) -> Place:
    """Return where a model is that a person may use.

    Raises:
        ServeError: there is none; the message lists the base models.
    """
    if name in settings.models:
        return Place(base_place(name, settings.models[name], settings.runs))
    row = find_trained(db, person, name)
    if row is None:
        known = ", ".join(settings.models) or "none; start the server with --model NAME=MODEL"
        raise ServeError(
            404,
            f"The model {name[:200]!r} does not exist or is not yours. Base models: {known}.",
            code="model_not_found",
            param="model",
        )
    return trained_place(settings, row["id"], step=row["checkpoint_step"])


def find_whole(db: sqlite3.Connection, settings: Settings, person: Person, *, name: str) -> str:
    """Return the folder or hub id of a whole model, from which a job can start.

    Raises:
        ServeError: there is none, or it is a checkpoint.
    """
    row = None if name in settings.models else find_trained(db, person, name)
    if row is None:
        return find_place(db, settings, person, name=name).model
    if row["checkpoint_step"] is not None:
        raise ServeError(
            400,
            f"{name[:200]!r} is a checkpoint, from which no job can start. Use the job's model "
            f"{row['fine_tuned_model']}.",
            param="model",
        )
    return whole_place(settings, row["id"])


def model_object(name: str, owner: str, created: int, *, root: str | None = None) -> dict[str, Any]:
    """Return the API's object of a model."""
    found = {"id": name, "object": "model", "created": created, "owned_by": owner}
    return {**found, "root": root} if root else found


def _trained_object(row: sqlite3.Row, name: str) -> dict[str, Any]:
    return model_object(name, f"org-{row['owner']}", row["made_at"], root=row["model"])


def add_models(routes: APIRouter, api: Api) -> None:
    """Add the routes below /v1/models."""
    me = api.me

    @routes.get("/models")
    def list_(person: Annotated[Person, me]) -> dict[str, Any]:
        data = [model_object(name, "align", STARTED) for name in api.settings.models]
        query = (
            "SELECT *, finished_at AS made_at FROM jobs"
            " WHERE owner = ? AND status = 'succeeded' AND deleted = 0"
        )
        with api.store.read() as db:
            rows = db.execute(query, (person.id,)).fetchall()
        data += [_trained_object(row, row["fine_tuned_model"]) for row in rows]
        return {"object": "list", "data": data}

    # A name may be a hub id with a slash in it.
    @routes.get("/models/{name:path}")
    def retrieve(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.read() as db:
            row = None if name in api.settings.models else find_trained(db, person, name)
            if row is None:
                find_place(db, api.settings, person, name=name)
        return model_object(name, "align", STARTED) if row is None else _trained_object(row, name)

    @routes.delete("/models/{name:path}")
    def delete(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.write() as db:
            find_place(db, api.settings, person, name=name)
            query = "UPDATE jobs SET deleted = 1 WHERE fine_tuned_model = ? AND owner = ?"
            if not db.execute(query, (name, person.id)).rowcount:
                raise ServeError(
                    403,
                    f"{name[:200]!r}: only the owner deletes a fine-tuned model, by its own name.",
                    param="model",
                )
        # The run stays: it is an ordinary run of the runs' folder, for its owner to remove.
        return {"id": name, "object": "model", "deleted": True}
