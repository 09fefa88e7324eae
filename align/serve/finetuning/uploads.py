"""Uploads: large files that come in parts."""

import sqlite3
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Request, UploadFile
from pydantic import Field

from align.serve.auth import Person
from align.serve.errors import ServeError, not_found
from align.serve.finetuning.asked import Asked
from align.serve.finetuning.common import Api, new_id, now, owned
from align.serve.finetuning.files import (
    UPLOAD_S,
    ExpiresAfter,
    Purpose,
    check_quota,
    file_object,
    filename_of,
    find_file,
    insert_file,
)
from align.serve.finetuning.retries import once


class UploadRequest(Asked):
    """Announcement of a file that comes in parts."""

    bytes: Annotated[int, Field(ge=1)]
    filename: Annotated[str, Field(min_length=1, max_length=255)]
    mime_type: str
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class CompleteRequest(Asked):
    """The order of an upload's parts."""

    part_ids: list[str]
    md5: str | None = None


def _upload_object(row: sqlite3.Row, file: dict[str, Any] | None = None) -> dict[str, Any]:
    expired = row["status"] == "pending" and row["created_at"] + UPLOAD_S < now()
    return {
        "id": row["id"],
        "object": "upload",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["created_at"] + UPLOAD_S,
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "expired" if expired else row["status"],
        "file": file,
    }


def _pending(db: sqlite3.Connection, person: Person, name: str) -> sqlite3.Row:
    row = owned(db, "uploads", person, name=name)
    status = _upload_object(row)["status"]
    if status != "pending":
        raise ServeError(400, f"Upload {name} is {status}; expected a pending one.")
    return row


def _room(db: sqlite3.Connection, person: Person, name: str) -> int:
    """Return the bytes that a pending upload may still get."""
    room = _pending(db, person, name)["bytes"]
    query = "SELECT coalesce(sum(bytes), 0) FROM parts WHERE upload = ?"
    return room - db.execute(query, (name,)).fetchone()[0]


def _create(db: sqlite3.Connection, person: Person, asked: UploadRequest) -> dict[str, Any]:
    name = new_id("upload")
    filename, expires_s = filename_of(asked.filename), asked.expires_after
    db.execute(
        "INSERT INTO uploads (id, owner, filename, purpose, bytes, created_at, expires_s)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            *(name, person.id, filename, asked.purpose, asked.bytes, now()),
            expires_s and expires_s.seconds,
        ),
    )
    return _upload_object(owned(db, "uploads", person, name=name))


def add_uploads(routes: APIRouter, api: Api) -> None:
    """Add the routes below /v1/uploads."""
    me = api.me

    @routes.post("/uploads")
    def create(
        asked: UploadRequest, request: Request, person: Annotated[Person, me]
    ) -> dict[str, Any]:
        if asked.bytes > (limit := api.settings.file_mib * 2**20):
            raise ServeError(413, f"bytes: {asked.bytes} is more than the limit of {limit}.")
        check_quota(api, person, asked.bytes)
        make = partial(_create, person=person, asked=asked)
        return once(api.store, request, person, asks=asked.model_dump(), make=make)

    @routes.post("/uploads/{name}/parts")
    def add_part(
        *, name: str, request: Request, person: Annotated[Person, me], data: UploadFile
    ) -> dict[str, Any]:
        with api.store.read() as db:
            announced = _pending(db, person, name)["bytes"]
        part, made = new_id("part"), now()
        size, sha256, _ = api.files.write(part, [data.file], limit=announced)

        def make(db: sqlite3.Connection) -> dict[str, Any]:
            # Not before: a retry of the last part finds no room, and needs none.
            if size > _room(db, person, name):
                told = f"The parts are larger than the {announced} bytes that were announced."
                raise ServeError(413, told, param="data")
            add = "INSERT INTO parts (id, upload, bytes, created_at) VALUES (?, ?, ?, ?)"
            db.execute(add, (part, name, size, made))
            return {"id": part, "object": "upload.part", "created_at": made, "upload_id": name}

        kept = None
        try:
            answer = once(api.store, request, person, asks={"sha256": sha256}, make=make)
            kept = answer["id"]
        finally:
            if kept != part:
                api.files.path(part).unlink(missing_ok=True)
        return answer

    @routes.post("/uploads/{name}/complete")
    def complete(
        name: str, asked: CompleteRequest, person: Annotated[Person, me]
    ) -> dict[str, Any]:
        return _complete(api, person, name=name, asked=asked)

    @routes.post("/uploads/{name}/cancel")
    def cancel(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        return _cancel(api, person, name)


def _cancel(api: Api, person: Person, name: str) -> dict[str, Any]:
    """Cancel an upload and return it."""
    with api.store.write() as db:
        row = owned(db, "uploads", person, name=name)
        if row["status"] != "cancelled":  # a retry finds its work done
            _pending(db, person, name)
            db.execute("UPDATE uploads SET status = ? WHERE id = ?", ("cancelled", name))
            row = owned(db, "uploads", person, name=name)
    _forget_parts(api, name)
    return _upload_object(row)


def _complete(api: Api, person: Person, *, name: str, asked: CompleteRequest) -> dict[str, Any]:
    """Make a file of an upload's parts; a repeated call returns the same file."""
    with api.store.read() as db:
        row = owned(db, "uploads", person, name=name)
        if row["status"] == "completed":  # the answer to the first request was lost
            return _upload_object(row, file_object(find_file(db, person, row["file"])))
        row = _pending(db, person, name)
        query = "SELECT id FROM parts WHERE upload = ?"
        known = {part["id"] for part in db.execute(query, (name,))}
    if unknown := [part for part in asked.part_ids if part not in known]:
        raise not_found("part of this upload", unknown[0])
    if len(set(asked.part_ids)) != len(asked.part_ids):
        raise ServeError(400, "part_ids: a part is named twice.", param="part_ids")
    # Outside of any transaction: the parts may have gigabytes.
    file = new_id("file")
    size, md5 = _join(api, file, asked.part_ids)
    problem = None
    if size != row["bytes"]:
        problem = f"The parts have {size} bytes, {row['bytes']} were announced."
    elif asked.md5 is not None and asked.md5.lower() != md5:
        problem = f"md5: the parts have {md5}, not {asked.md5[:40]}."
    if problem:
        api.files.path(file).unlink(missing_ok=True)
        raise ServeError(400, problem)
    with api.store.write() as db:
        # Another request may have completed or canceled the upload in the meantime.
        _pending(db, person, name)
        made = insert_file(
            db,
            person.id,
            name=file,
            filename=row["filename"],
            purpose=row["purpose"],
            size=size,
            expires_s=row["expires_s"],
        )
        update = "UPDATE uploads SET status = 'completed', file = ? WHERE id = ?"
        db.execute(update, (file, name))
        row = owned(db, "uploads", person, name=name)
    _forget_parts(api, name)
    return _upload_object(row, made)


def _join(api: Api, file: str, parts: list[str]) -> tuple[int, str]:
    """Write the parts of an upload as one file; return its size and md5."""

    def opened() -> Iterator[BinaryIO]:
        for part in parts:
            with api.files.path(part).open("rb") as source:
                yield source

    size, _, md5 = api.files.write(file, opened(), limit=api.settings.file_mib * 2**20)
    return size, md5


def _forget_parts(api: Api, upload: str) -> None:
    with api.store.write() as db:
        gone = db.execute("DELETE FROM parts WHERE upload = ? RETURNING id", (upload,)).fetchall()
    for part in gone:
        api.files.path(part["id"]).unlink(missing_ok=True)
