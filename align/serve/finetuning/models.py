"""Models: the bases that the server was started with, and what its jobs made of them."""

import sqlite3
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.common import now
from align.serve.finetuning.context import Api
from align.serve.finetuning.recipes import STAGE, base_place
from align.serve.settings import Settings

STARTED = now()


def trained_place(settings: Settings, job: str) -> str:
    """Return the folder of the model that a job has made."""
    return str((settings.runs / job / STAGE / "model").resolve())


def find_trained(db: sqlite3.Connection, person: Person, name: str) -> sqlite3.Row | None:
    """Return the job of a fine-tuned model or checkpoint that a person may use."""
    row = db.execute(
        "SELECT j.* FROM jobs j LEFT JOIN checkpoints c ON c.job = j.id"
        " WHERE (j.fine_tuned_model = ? OR c.name = ?) AND j.deleted = 0"
        " AND (j.owner = ? OR EXISTS (SELECT 1 FROM permissions p"
        "      WHERE p.checkpoint IN (j.fine_tuned_model, c.name) AND p.project = ?))",
        (name, name, person.id, person.name),
    ).fetchone()
    return row


def find_place(db: sqlite3.Connection, settings: Settings, person: Person, *, name: str) -> str:
    """Return the folder or hub id of a model that a person may use.

    Raises:
        ServeError: there is none; the message lists the base models.
    """
    if name in settings.models:
        return base_place(name, settings.models[name], settings.runs)
    row = find_trained(db, person, name)
    if row is None:
        known = ", ".join(settings.models) or "none; start the server with --model NAME=MODEL"
        raise ServeError(
            404,
            f"The model {name[:200]!r} does not exist or is not yours. Base models: {known}.",
            code="model_not_found",
            param="model",
        )
    return trained_place(settings, row["id"])


def model_object(name: str, owner: str, created: int, *, root: str | None = None) -> dict[str, Any]:
    """Return the API's object of a model."""
    found = {"id": name, "object": "model", "created": created, "owned_by": owner}
    return {**found, "root": root} if root else found


def _trained_object(row: sqlite3.Row, name: str) -> dict[str, Any]:
    return model_object(name, f"org-{row['owner']}", row["finished_at"], root=row["model"])


def add_models(routes: APIRouter, api: Api) -> None:
    """Add the routes below /v1/models."""
    me = api.me

    @routes.get("/models")
    def list_(person: Annotated[Person, me]) -> dict[str, Any]:
        data = [model_object(name, "align", STARTED) for name in api.settings.models]
        query = "SELECT * FROM jobs WHERE owner = ? AND status = 'succeeded' AND deleted = 0"
        with api.store.read() as db:
            rows = db.execute(query, (person.id,)).fetchall()
        data += [_trained_object(row, row["fine_tuned_model"]) for row in rows]
        return {"object": "list", "data": data}

    # A name may be a hub id with a slash in it.
    @routes.get("/models/{name:path}")
    def retrieve(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.read() as db:
            find_place(db, api.settings, person, name=name)
            row = find_trained(db, person, name)
        return model_object(name, "align", STARTED) if row is None else _trained_object(row, name)

    @routes.delete("/models/{name:path}")
    def delete(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.write() as db:
            find_place(db, api.settings, person, name=name)
            query = "UPDATE jobs SET deleted = 1 WHERE fine_tuned_model = ? AND owner = ?"
            if not db.execute(query, (name, person.id)).rowcount:
                raise ServeError(
                    403,
                    f"{name[:200]!r}: only the owner deletes a fine-tuned model.",
                    param="model",
                )
        # The run stays: it is an ordinary run of the runs' folder, for its owner to remove.
        return {"id": name, "object": "model", "deleted": True}


def model_files_exist(place: str) -> bool:
    """Return whether a model's folder is there, or may be a hub id."""
    return Path(place).is_dir() or not Path(place).is_absolute()
