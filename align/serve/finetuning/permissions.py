"""Permissions: which other tokens may use a checkpoint, by their names."""

import sqlite3
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from align.serve.auth import Person
from align.serve.errors import not_found
from align.serve.finetuning.asked import Asked
from align.serve.finetuning.common import Api, list_page, new_id, now


class PermissionRequest(Asked):
    """The names of the tokens that get access."""

    project_ids: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1)]


def _permission_object(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "checkpoint.permission",
        "created_at": row["created_at"],
        "project_id": row["project"],
    }


def _own_checkpoint(db: sqlite3.Connection, person: Person, name: str) -> str:
    query = (
        "SELECT c.name FROM checkpoints c JOIN jobs j ON j.id = c.job"
        " WHERE c.name = ? AND j.owner = ?"
    )
    if db.execute(query, (name, person.id)).fetchone() is None:
        raise not_found("checkpoint", name)
    return name


def _allow(
    db: sqlite3.Connection, checkpoint: str, projects: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the permissions of projects to use a checkpoint, made where they are missing."""
    for project in projects:
        # A repeated call is not an error, so that a retry finds its work done.
        db.execute(
            "INSERT OR IGNORE INTO permissions (id, checkpoint, project, created_at)"
            " VALUES (?, ?, ?, ?)",
            (new_id("cp"), checkpoint, project, now()),
        )
    marks = ", ".join("?" * len(projects))
    query = f"SELECT * FROM permissions WHERE checkpoint = ? AND project IN ({marks})"
    return [_permission_object(row) for row in db.execute(query, [checkpoint, *projects])]


def add_permissions(routes: APIRouter, api: Api) -> None:
    """Add the routes below /v1/fine_tuning/checkpoints."""
    me = api.me
    place = "/fine_tuning/checkpoints/{checkpoint:path}/permissions"

    @routes.post(place)
    def create(
        checkpoint: str, asked: PermissionRequest, person: Annotated[Person, me]
    ) -> dict[str, Any]:
        with api.store.write() as db:
            _own_checkpoint(db, person, checkpoint)
            data = _allow(db, checkpoint, asked.project_ids)
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return {"object": "list", "data": data, "has_more": False, **ends}

    @routes.get(place)
    def list_(
        *,
        checkpoint: str,
        person: Annotated[Person, me],
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 10,
        order: Literal["ascending", "descending"] = "descending",
        project_id: str | None = None,
    ) -> dict[str, Any]:
        with api.store.read() as db:
            where = {"checkpoint": _own_checkpoint(db, person, checkpoint)}
            where |= {"project": project_id} if project_id else {}
            return list_page(
                db,
                "permissions",
                _permission_object,
                where=where,
                after=after,
                limit=limit,
                order="asc" if order == "ascending" else "desc",
            )

    @routes.delete(place + "/{name}")
    def delete(checkpoint: str, name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.write() as db:
            _own_checkpoint(db, person, checkpoint)
            remove = "DELETE FROM permissions WHERE id = ? AND checkpoint = ?"
            if not db.execute(remove, (name, checkpoint)).rowcount:
                raise not_found("permission", name)
        return {"id": name, "object": "checkpoint.permission", "deleted": True}
