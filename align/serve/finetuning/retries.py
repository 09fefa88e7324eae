"""A request that a client sends again has the effect of one.

The openai client repeats a request after a timeout or a 5xx and counts its retries in a header, but
sends no key. Each attempt is therefore recorded before it has an effect. A retry looks for the
latest attempt at the same request that no other retry has claimed: if that one was answered, its
answer is returned; if not, the retry replaces it, and it will have no effect any more.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.store import Store

WINDOW_S = 3600.0
"""Age from which on an attempt is none of a retry; the client's own limit is 10 minutes."""
Make = Callable[[sqlite3.Connection], dict[str, Any]]


def fingerprint(request: Mapping[str, Any]) -> str:
    """Return a hash of what a request asks for."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def once(
    store: Store, request: Request, person: Person, *, asks: Mapping[str, Any], make: Make
) -> dict[str, Any]:
    """Return the answer of ``make``, or the one of an earlier attempt at the same request.

    Args:
        store: the database.
        request: its headers tell whether it is a retry.
        person: who sends it.
        asks: what it asks for.
        make: has the effect, in one transaction with its record.

    Raises:
        ServeError: a key was used for another request, or a later retry was faster.
    """
    mark = fingerprint(asks)
    key = request.headers.get("idempotency-key")
    count = request.headers.get("x-stainless-retry-count", "0")
    retry = int(count) if count.isdecimal() and len(count) < 6 else 0
    # A loss of power that forgets this attempt forgets its effect too, which is written after it.
    with store.write(durable=False) as db:
        mine = db.execute(
            "INSERT INTO attempts (owner, route, fingerprint, retry, key, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (person.id, request.url.path, mark, retry, key, time.time()),
        ).lastrowid
    with store.write() as db:
        row = db.execute("SELECT * FROM attempts WHERE seq = ?", (mine,)).fetchone()
        answer = _answer_to_key(db, row) if key else _answer_to_retry(db, row)
        if answer is None:
            answer = json.dumps(make(db))
        db.execute("UPDATE attempts SET answer = ? WHERE seq = ?", (answer, mine))
    return json.loads(answer)


def forget(db: sqlite3.Connection) -> None:
    """Remove attempts that no retry can mean any more."""
    db.execute("DELETE FROM attempts WHERE created_at < ?", (time.time() - 24 * WINDOW_S,))


def _answer_to_key(db: sqlite3.Connection, mine: sqlite3.Row) -> str | None:
    row = db.execute(
        "SELECT * FROM attempts WHERE owner = ? AND key = ? AND answer IS NOT NULL LIMIT 1",
        (mine["owner"], mine["key"]),
    ).fetchone()
    if row is None:
        return None
    if (row["route"], row["fingerprint"]) != (mine["route"], mine["fingerprint"]):
        raise ServeError(
            400,
            "This Idempotency-Key was used for another request. Use a new one.",
            code="idempotency_key_reused",
        )
    return row["answer"]


def _answer_to_retry(db: sqlite3.Connection, mine: sqlite3.Row) -> str | None:
    if mine["replaced"]:
        # The client gave this attempt up and sent it again; only the later one counts.
        raise ServeError(409, "A retry of this request was faster.", code="replaced_by_retry")
    if not mine["retry"]:
        return None
    row = db.execute(
        "SELECT * FROM attempts WHERE owner = ? AND route = ? AND fingerprint = ? AND key IS NULL"
        " AND retry < ? AND seq < ? AND replaced = 0 AND created_at > ?"
        " ORDER BY seq DESC LIMIT 1",
        (
            *(mine["owner"], mine["route"], mine["fingerprint"]),
            *(mine["retry"], mine["seq"], mine["created_at"] - WINDOW_S),
        ),
    ).fetchone()
    if row is None:
        return None
    db.execute("UPDATE attempts SET replaced = 1 WHERE seq = ?", (row["seq"],))
    return row["answer"]
