"""Who sends a request: bearer tokens for programs, a signed cookie for browsers."""

import hashlib
import hmac
import os
import secrets
import sqlite3
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import Request, Response

from align.core.errors import RecipeError
from align.serve.errors import ServeError
from align.serve.store import Store

MIGRATIONS = (
    """
    CREATE TABLE tokens (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        hash TEXT NOT NULL UNIQUE,
        created_at REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0),
        revoked_at REAL
    );
    CREATE TABLE login_codes (
        hash TEXT PRIMARY KEY,
        token_id INTEGER NOT NULL REFERENCES tokens (id),
        expires_at REAL NOT NULL
    );
    """,
    """
    ALTER TABLE tokens ADD COLUMN role TEXT NOT NULL DEFAULT 'admin'
        CHECK (role IN ('admin', 'annotator'));
    """,
)
Role = Literal["admin", "annotator"]
"""What a token may do: everything, or only label."""
ONLY_LABELS = "annotators_only_label"
"""Code of the error that an annotator gets outside of labeling."""
OWNER = "owner"
"""Name of the person who starts the server and logs in by the printed address."""
DELEGATE = "sk-delegate-"
"""Beginning of the tokens that the server gives its own programs."""
COOKIE = "align_session"
KEY_FILE = "session.key"
SESSION_S = 14 * 24 * 3600
CODE_S = 3600
MAX_FAILURES, FAILURES_S = 30, 60.0
"""Wrong tokens and codes per address and time that are answered with 401; more get 429."""


@dataclass(frozen=True, slots=True)
class Person:
    """The sender of a request: a token's row, by whichever proof.

    Attributes:
        id: number of the token, which the rows of an owner refer to.
        name: name of the token; labels are recorded under it.
        csrf: what the person's forms must send; empty for a bearer token, which no other site
            can make a browser send.
        role: what the token may do.
    """

    id: int
    name: str
    csrf: str = ""
    role: Role = "admin"

    @property
    def is_admin(self) -> bool:
        """Return whether the person may do everything."""
        return self.role == "admin"


class Auth:
    """Tokens, sessions and login codes of one server.

    The methods ``bearer``, ``browser`` and ``form`` are dependencies of routes. They refuse
    annotators, who may only use the routes with ``labeler`` and ``labeler_form``.

    Args:
        store: where the hashes of the tokens are.
        folder: where the key that signs sessions is kept.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        store.migrate("auth", MIGRATIONS)
        self._store = store
        self._key = _key(folder / KEY_FILE)
        self._failures: dict[str, deque[float]] = {}

    # ---- making proofs

    def new_token(self, name: str, role: Role = "admin") -> str:
        """Return a new token of this name, of which only the hash is kept.

        Raises:
            RecipeError: the name is taken or is not a name.
        """
        if not name.strip() or len(name) > 64 or not name.isprintable():
            raise RecipeError(f"--new-token {name!r}: expected a name of 1 to 64 characters")
        token = f"sk-align-{secrets.token_urlsafe(32)}"
        try:
            with self._store.write() as db:
                insert = "INSERT INTO tokens (name, hash, role) VALUES (?, ?, ?)"
                db.execute(insert, (name, _hash(token), role))
        except sqlite3.IntegrityError:
            raise RecipeError(f"--new-token {name}: there is one already; use another") from None
        return token

    def revoke_token(self, name: str) -> None:
        """Refuse the token of this name, and the sessions that were begun with it, from now on.

        Raises:
            RecipeError: there is no such token, or it has none that could be refused.
        """
        if name == OWNER:
            raise RecipeError(f"--revoke-token {OWNER}: it has no token, only login codes")
        query = (
            "UPDATE tokens SET revoked_at = (julianday('now') - 2440587.5) * 86400.0"
            " WHERE name = ? AND revoked_at IS NULL"
        )
        with self._store.write() as db:
            if db.execute(query, (name,)).rowcount:
                return
            rows = db.execute(
                "SELECT name FROM tokens WHERE revoked_at IS NULL AND name != ?", (OWNER,)
            )
            known = ", ".join(sorted(row["name"] for row in rows)) or "none"
        raise RecipeError(f"--revoke-token {name}: there is no such token; there are: {known}")

    def login_code(self) -> str:
        """Return a code with which the owner can log in once, within an hour."""
        code = secrets.token_urlsafe(32)
        with self._store.write() as db:
            owner = "INSERT INTO tokens (name, hash) VALUES (?, ?) ON CONFLICT DO NOTHING"
            db.execute(owner, (OWNER, _hash(secrets.token_urlsafe(32))))
            db.execute("DELETE FROM login_codes WHERE expires_at < ?", (time.time(),))
            db.execute(
                "INSERT INTO login_codes SELECT ?, id, ? FROM tokens WHERE name = ?",
                (_hash(code), time.time() + CODE_S, OWNER),
            )
        return code

    def log_in(
        self, request: Request, response: Response, *, code: str = "", token: str = ""
    ) -> None:
        """Set the session's cookie in exchange for a login code or a token.

        Raises:
            ServeError: neither is valid.
        """
        query = "SELECT id FROM tokens WHERE hash = ? AND revoked_at IS NULL"
        with self._store.write() as db:
            row = db.execute(query, (_hash(token),)).fetchone()
            if code:
                spend = (
                    "DELETE FROM login_codes WHERE hash = ? AND expires_at > ? RETURNING token_id"
                )
                row = db.execute(spend, (_hash(code), time.time())).fetchone()
        if row is None:
            self._slow_down(request)
            raise ServeError(401, "This code or token is not valid. A code works once.")
        value = self._signed(f"{row[0]}.{int(time.time()) + SESSION_S}.{secrets.token_hex(8)}")
        response.set_cookie(
            COOKIE,
            value,
            max_age=SESSION_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )

    def delegate(self, person_id: int) -> str:
        """Return a token for a program of the server that acts for a person, such as a grader."""
        return f"{DELEGATE}{person_id}.{self._mac(f'delegate {person_id}')}"

    # ---- checking proofs

    def bearer(self, request: Request) -> Person:
        """Return the admin of the header ``Authorization: Bearer TOKEN``.

        Raises:
            ServeError: there is no valid token, or it is an annotator's.
        """
        return _admin(self._by_token(request))

    def browser(self, request: Request) -> Person:
        """Return the admin of the session's cookie, or of a bearer token.

        Raises:
            ServeError: there is neither, which a page answers with the login, or it is an
                annotator's.
        """
        return _admin(self.labeler(request))

    def labeler(self, request: Request) -> Person:
        """Return the person of the session's cookie, or of a bearer token, of any role.

        Raises:
            ServeError: there is neither; a page answers it with the login.
        """
        return self.session(request) or self._by_token(request)

    def session(self, request: Request) -> Person | None:
        """Return the person of the session's cookie; None without a valid one."""
        value = request.cookies.get(COOKIE, "")
        body = value.rpartition(".")[0]
        if not body or not hmac.compare_digest(value.encode(), self._signed(body).encode()):
            return None
        token_id, expires, _ = body.split(".")
        if int(expires) < time.time():
            return None
        return self._person("id = ?", int(token_id), csrf=self._mac("csrf " + body))

    async def form(self, request: Request) -> Person:
        """Return the admin of a request that changes something, and check its CSRF token.

        Raises:
            ServeError: as ``labeler_form``, or it is an annotator's.
        """
        return _admin(await self.labeler_form(request))

    async def labeler_form(self, request: Request) -> Person:
        """Return the person of a request that changes something, of any role.

        The CSRF token is the field ``csrf`` of a form or the header ``X-CSRF-Token``.

        Raises:
            ServeError: nobody is logged in, or the token is missing or wrong.
        """
        person = self.labeler(request)
        if person.csrf:
            given: Any = request.headers.get("x-csrf-token")
            if given is None:
                given = (await request.form()).get("csrf")
            if not isinstance(given, str) or not hmac.compare_digest(
                given.encode(), person.csrf.encode()
            ):
                raise ServeError(403, "The form has no valid CSRF token. Reload the page.")
        return person

    # ---- parts

    def _by_token(self, request: Request) -> Person:
        """Return the person of the header ``Authorization: Bearer TOKEN``.

        Raises:
            ServeError: there is no valid token.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        person, token = None, token.strip()
        number = token.removeprefix(DELEGATE).partition(".")[0]
        if scheme.lower() != "bearer":
            pass
        elif not token.startswith(DELEGATE):
            person = self._person("hash = ?", _hash(token))
        elif (
            number.isdecimal()
            and len(number) < 10
            and hmac.compare_digest(
                token.encode(errors="replace"), self.delegate(int(number)).encode()
            )
        ):
            person = self._person("id = ?", int(number))
        if person is None:
            if token:
                self._slow_down(request)
            raise ServeError(
                401,
                "Incorrect API key provided. Make one with: align serve --new-token NAME",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return person

    def _person(self, condition: str, value: object, csrf: str = "") -> Person | None:
        query = f"SELECT id, name, role FROM tokens WHERE {condition} AND revoked_at IS NULL"
        with self._store.read() as db:
            row = db.execute(query, (value,)).fetchone()
        return None if row is None else Person(row["id"], row["name"], csrf, row["role"])

    def _mac(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def _signed(self, body: str) -> str:
        return f"{body}.{self._mac('session ' + body)}"

    def _slow_down(self, request: Request) -> None:
        """Count a wrong proof of an address, and refuse it with 429 if there were many.

        A right proof is never refused: others at the same address may be the ones that guess.
        """
        if len(self._failures) > 10_000:  # a flood from many addresses must not fill the memory
            self._failures.clear()
        recent = self._failures.setdefault(_address(request), deque(maxlen=MAX_FAILURES))
        full = len(recent) == MAX_FAILURES and recent[0] > time.monotonic() - FAILURES_S
        recent.append(time.monotonic())
        if full:
            raise ServeError(
                429,
                f"More than {MAX_FAILURES} wrong tokens in a minute. Wait a minute.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(int(FAILURES_S))},
            )


def _admin(person: Person) -> Person:
    """Return an admin.

    Raises:
        ServeError: the person is an annotator.
    """
    if person.is_admin:
        return person
    message = "This token is an annotator's: it may label at /labels, and nothing else."
    raise ServeError(403, message, code=ONLY_LABELS)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _hash(secret: str) -> str:
    # Tokens and codes are 256 random bits, so a fast hash is as safe as a slow one.
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def _key(path: Path) -> bytes:
    """Return the key in a file that only its owner can read; it is made once."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(fd, "wb") as f:
        f.write(secrets.token_bytes(32))
    return path.read_bytes()
