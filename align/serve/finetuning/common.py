"""What the routes share: the services they are given, ids, pages of lists, limits by token."""

import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from align.serve.auth import Person
from align.serve.errors import ServeError, not_found
from align.serve.services import Services
from align.serve.settings import Settings
from align.serve.store import Store

if TYPE_CHECKING:
    from align.serve.finetuning.files import Files
    from align.serve.finetuning.generation import Generators


Order = Literal["asc", "desc"]
WHAT = {
    "files": "File object",
    "uploads": "Upload",
    "jobs": "fine-tuning job",
    "webhooks": "webhook",
}
"""Rows that belong to a person, by what errors call them."""


@dataclass(frozen=True, slots=True)
class Api:
    """Services and parts of the API.

    Attributes:
        services: of the server.
        files: contents of files.
        generators: processes that generate text.
        wake: set when the queue has something to do.
        me: dependency that returns who sends a request, counted against the rate limit.
    """

    services: Services
    files: "Files"
    generators: "Generators"
    wake: threading.Event
    me: Any

    @property
    def settings(self) -> Settings:
        """Settings of the server."""
        return self.services.settings

    @property
    def store(self) -> Store:
        """The database."""
        return self.services.store


def new_id(prefix: str) -> str:
    """Return an id that nobody can guess."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """Return the time in whole seconds, as the API's objects have it."""
    return int(time.time())


def list_page(
    db: sqlite3.Connection,
    table: str,
    shown: Callable[[sqlite3.Row], dict[str, Any]],
    *,
    where: Mapping[str, Any],
    after: str | None,
    limit: int,
    order: Order = "desc",
) -> dict[str, Any]:
    """Return one page of a list, which begins after the item with the id ``after``.

    Args:
        db: the database.
        table: its rows are listed by ``seq``.
        shown: returns the object of a row.
        where: columns and the values that they must have, or SQL conditions and their value.
        after: id of the last item of the page before.
        limit: largest number of items.
        order: oldest first, or newest first.
    """
    conditions = [key if "?" in key else f"{key} = ?" for key in where]
    values = list(where.values())
    if after:
        found = db.execute(
            f"SELECT seq FROM {table} WHERE id = ? AND {' AND '.join(conditions)}", [after, *values]
        ).fetchone()
        if found is None:
            raise not_found("item to list after", after, param="after")
        conditions.append("seq > ?" if order == "asc" else "seq < ?")
        values.append(found["seq"])
    query = f"SELECT * FROM {table} WHERE {' AND '.join(conditions)} ORDER BY seq {order} LIMIT ?"
    rows = db.execute(query, [*values, limit + 1]).fetchall()
    data = [shown(row) for row in rows[:limit]]
    return {
        "object": "list",
        "data": data,
        "has_more": len(rows) > limit,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def owned(db: sqlite3.Connection, table: str, person: Person, *, name: str) -> sqlite3.Row:
    """Return the row of an id that belongs to a person.

    Raises:
        ServeError: there is none; whether it belongs to another is not told.
    """
    query = f"SELECT * FROM {table} WHERE id = ? AND owner = ?"
    row = db.execute(query, (name, person.id)).fetchone()
    if row is None:
        raise not_found(WHAT[table], name)
    return row


class RateLimit:
    """A bucket of requests for each token, which refills evenly.

    Args:
        per_minute: requests in a minute, and the largest number at once.
    """

    def __init__(self, per_minute: int) -> None:
        self._size = float(per_minute)
        self._buckets: dict[int, tuple[float, float]] = {}

    def take(self, person: Person) -> None:
        """Count a request.

        Raises:
            ServeError: the bucket is empty; the client waits and tries again.
        """
        then = time.monotonic()
        left, since = self._buckets.get(person.id, (self._size, then))
        left = min(self._size, left + (then - since) * self._size / 60)
        if left < 1:
            wait_s = (1 - left) * 60 / self._size
            raise ServeError(
                429,
                f"Rate limit of {self._size:.0f} requests per minute reached.",
                code="rate_limit_exceeded",
                headers={"Retry-After-Ms": str(int(wait_s * 1000) + 1)},
            )
        self._buckets[person.id] = (left - 1, then)
