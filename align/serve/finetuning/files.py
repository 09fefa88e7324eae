"""Files: rows of the database, and contents below ``.serve/files``."""

import hashlib
import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Depends, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse
from pydantic import Field

from align.core.text import visible
from align.serve.auth import Person
from align.serve.errors import ServeError, not_found
from align.serve.finetuning.asked import Asked
from align.serve.finetuning.common import Api, Order, list_page, new_id, now, owned
from align.serve.finetuning.retries import once

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000
UPLOAD_S = 3600
"""Seconds in which an upload must be completed."""
CHUNK = 2**20


class ExpiresAfter(Asked):
    """When a file expires."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]


class Files:
    """Contents of files by id.

    Args:
        folder: ``.serve``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "files"
        self._folder.mkdir(exist_ok=True, mode=0o700)

    def path(self, name: str) -> Path:
        """Return the place of a file or part; its id was made here and is not a path."""
        return self._folder / f"{name}.jsonl"

    def write(self, name: str, sources: Iterable[BinaryIO], *, limit: int) -> tuple[int, str, str]:
        """Write the sources one after the other; return size, sha256 and md5.

        Raises:
            ServeError: they are larger than the limit.
        """
        path, size = self.path(name), 0
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        try:
            with path.open("xb") as f:
                os.chmod(path, 0o600)
                for source in sources:
                    while block := source.read(CHUNK):
                        size += len(block)
                        if size > limit:
                            raise ServeError(413, f"The file is larger than {limit} bytes.")
                        f.write(block)
                        sha256.update(block)
                        md5.update(block)
                f.flush()
                os.fsync(f.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return size, sha256.hexdigest(), md5.hexdigest()

    def sweep(self, db: sqlite3.Connection) -> None:
        """Remove what has expired, and contents without a row, which a kill has left."""
        db.execute("DELETE FROM files WHERE expires_at < ?", (now(),))
        old = now() - UPLOAD_S
        expired = "SELECT id FROM uploads WHERE status = 'pending' AND created_at < ?"
        db.execute(f"DELETE FROM parts WHERE upload IN ({expired})", (old,))
        db.execute(f"UPDATE uploads SET status = 'expired' WHERE id IN ({expired})", (old,))
        known = {row["id"] for row in db.execute("SELECT id FROM files UNION SELECT id FROM parts")}
        for path in self._folder.iterdir():
            # A content is written before its row: a new one may be about to get it.
            if path.stem not in known and path.stat().st_mtime < old:
                path.unlink(missing_ok=True)


def file_object(row: sqlite3.Row) -> dict[str, Any]:
    """Return the API's object of a file."""
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
        "status_details": None,
    }


def insert_file(
    db: sqlite3.Connection,
    owner: int,
    *,
    name: str,
    filename: str,
    purpose: str,
    size: int,
    expires_s: int | None = None,
) -> dict[str, Any]:
    """Enter a file whose content is written; return its object."""
    made = now()
    db.execute(
        "INSERT INTO files (id, owner, filename, purpose, bytes, created_at, expires_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (name, owner, filename, purpose, size, made, expires_s and made + expires_s),
    )
    return file_object(db.execute("SELECT * FROM files WHERE id = ?", (name,)).fetchone())


def check_quota(api: Api, person: Person, more: int = 0) -> None:
    """Raise if a person's files would be larger than allowed."""
    query = (
        "SELECT coalesce((SELECT sum(bytes) FROM files WHERE owner = ?), 0) +"
        " coalesce((SELECT sum(bytes) FROM uploads WHERE owner = ? AND status = 'pending'), 0)"
    )
    with api.store.read() as db:
        (used,) = db.execute(query, (person.id, person.id)).fetchone()
    allowed = api.settings.token_gib * 2**30
    if used + more > allowed:
        raise ServeError(
            403,
            f"Your files have {used} bytes and {more} more do not fit into the quota of "
            f"{allowed:.0f}. Delete some.",
            code="insufficient_quota",
        )


def filename_of(given: str | None) -> str:
    """Return the last part of a file's name, as something to show; it is never a path here."""
    last = (given or "file").replace("\\", "/").rpartition("/")[2]
    return visible(last)[:255] or "file"


FIELDS = frozenset(("file", "purpose", "expires_after[anchor]", "expires_after[seconds]"))


async def _known_fields(request: Request) -> None:
    """Refuse a form with a field that the route would ignore.

    Raises:
        ServeError: names the field.
    """
    unknown = sorted(set(await request.form()) - FIELDS)
    if unknown:
        told = f"Unknown field '{visible(unknown[0])}'; expected {', '.join(sorted(FIELDS))}."
        raise ServeError(400, told, param=unknown[0])


def add_files(routes: APIRouter, api: Api) -> None:
    """Add the routes below /v1/files."""
    me = api.me

    @routes.post("/files", dependencies=[Depends(_known_fields)])
    def create(
        *,
        request: Request,
        person: Annotated[Person, me],
        file: UploadFile,
        purpose: Annotated[Purpose, Form()],
        anchor: Annotated[
            Literal["created_at"], Form(alias="expires_after[anchor]")
        ] = "created_at",
        seconds: Annotated[
            int | None, Form(alias="expires_after[seconds]", ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)
        ] = None,
    ) -> dict[str, Any]:
        check_quota(api, person, file.size or 0)
        name, filename = new_id("file"), filename_of(file.filename)
        limit = api.settings.file_mib * 2**20
        size, sha256, _ = api.files.write(name, [file.file], limit=limit)

        def make(db: sqlite3.Connection) -> dict[str, Any]:
            return insert_file(
                db,
                person.id,
                name=name,
                filename=filename,
                purpose=purpose,
                size=size,
                expires_s=seconds,
            )

        asks = {"sha256": sha256, "filename": filename, "purpose": purpose, "seconds": seconds}
        answer = once(api.store, request, person, asks=asks, make=make)
        if answer["id"] != name:
            api.files.path(name).unlink(missing_ok=True)
        return answer

    _add_kept_files(routes, api)


def _add_kept_files(routes: APIRouter, api: Api) -> None:
    """Add the routes of files that are there already."""
    me = api.me

    @routes.get("/files")
    def list_(
        *,
        person: Annotated[Person, me],
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Order = "desc",
        purpose: str | None = None,
    ) -> dict[str, Any]:
        where = {"owner": person.id, "coalesce(expires_at, 1e18) > ?": now()}
        where |= {"purpose": purpose} if purpose else {}
        with api.store.read() as db:
            return list_page(
                db, "files", file_object, where=where, after=after, limit=limit, order=order
            )

    @routes.get("/files/{name}")
    def retrieve(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.read() as db:
            return file_object(find_file(db, person, name))

    @routes.get("/files/{name}/content")
    def content(name: str, person: Annotated[Person, me]) -> FileResponse:
        with api.store.read() as db:
            row = find_file(db, person, name)
        return FileResponse(api.files.path(row["id"]), media_type="application/octet-stream")

    @routes.delete("/files/{name}")
    def delete(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.write() as db:
            row = find_file(db, person, name)
            db.execute("DELETE FROM files WHERE id = ?", (row["id"],))
        api.files.path(row["id"]).unlink(missing_ok=True)
        return {"id": row["id"], "object": "file", "deleted": True}


def find_file(db: sqlite3.Connection, person: Person, name: str) -> sqlite3.Row:
    """Return the row of a file that belongs to a person and has not expired."""
    row = owned(db, "files", person, name=name)
    if row["expires_at"] is not None and row["expires_at"] < now():
        raise not_found("File object", name)
    return row
