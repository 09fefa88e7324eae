"""Webhooks that report the end of a job, signed as the Standard Webhooks specification asks.

An event is entered in the transaction that ends the job, and delivered at least once.
"""

import base64
import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
import secrets
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter
from pydantic import Field

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.asked import Asked
from align.serve.finetuning.common import Api, list_page, new_id, now, owned
from align.serve.store import Store

log = logging.getLogger(__name__)
EVENTS = (
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
)
Event = Literal["fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"]
NAT64 = ipaddress.ip_network("64:ff9b::/96")
MAX_HOOKS = 10
MAX_SENDERS = 16
"""Webhooks to which events are sent at the same time."""
TIMEOUT_S = 10.0
"""Seconds in which a receiver must answer."""
WAITS_S = (5, 30, 300, 1800, 7200, 18_000, 36_000)
"""Seconds between the attempts of a delivery; after the last one it is given up."""


class BlockedAddressError(OSError):
    """A webhook's host is an address of this machine or its network."""


class WebhookRequest(Asked):
    """A new webhook."""

    url: Annotated[str, Field(max_length=2000)]
    events: Annotated[list[Event], Field(min_length=1)] = list(EVENTS)  # type: ignore[assignment]


def announce(db: sqlite3.Connection, owner: int, *, event: str, job: str) -> None:
    """Enter the deliveries of an event, in the transaction that causes it."""
    name, made = new_id("evt"), now()
    body = json.dumps(
        {"id": name, "object": "event", "created_at": made, "type": event, "data": {"id": job}}
    )
    for hook in db.execute("SELECT * FROM webhooks WHERE owner = ?", (owner,)).fetchall():
        if event in json.loads(hook["events"]):
            db.execute(
                "INSERT INTO deliveries (webhook, event, body, next_at) VALUES (?, ?, ?, ?)",
                (hook["id"], name, body, time.time()),
            )


def sign(secret: str, *, event: str, timestamp: int, body: str) -> str:
    """Return the header ``webhook-signature`` (standardwebhooks.com)."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mac = hmac.new(key, f"{event}.{timestamp}.{body}".encode(), hashlib.sha256)
    return "v1," + base64.b64encode(mac.digest()).decode()


def public_address(host: str, port: int, *, private: bool) -> str:
    """Return an address of a host that a webhook may be sent to.

    The connection is made to this address and not to the name, which could resolve to another one
    a moment later.

    Args:
        host: name or address.
        port: of the connection.
        private: allow this machine and its network.

    Raises:
        BlockedAddressError: any of its addresses is not public.
        OSError: the name has no address.
    """
    # A name of this machine (RFC 6761), also where no resolver knows it.
    if not private and host.lower().rstrip(".").endswith("localhost"):
        raise BlockedAddressError(f"{host} is this machine")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    for address in addresses:
        if not private and not _is_public(ipaddress.ip_address(address)):
            raise BlockedAddressError(f"{host} is {address}, which is not a public address")
    return addresses[0]


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return _is_public(ip.ipv4_mapped)
        # Translated and tunneled addresses lead to IPv4 addresses, perhaps private ones.
        if ip.sixtofour or ip.teredo or ip in NAT64:
            return False
    return ip.is_global and not ip.is_multicast


def send(url: str, body: str, headers: dict[str, str], *, private: bool) -> int:
    """Post a body; return the status of the answer, which is not read and not followed.

    Raises:
        OSError: there is no answer in time, or the address is blocked.
        http.client.HTTPException: the answer is not HTTP.
    """
    ends = time.monotonic() + TIMEOUT_S
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    address = public_address(host, port, private=private)
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    connection.sock = socket.create_connection((address, port), timeout=TIMEOUT_S)
    # The socket's own timeout begins again with each byte of an answer that trickles in.
    watch = threading.Timer(max(0.0, ends - time.monotonic()), _hang_up, [connection])
    watch.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            secure = context.wrap_socket(
                connection.sock, server_hostname=host, do_handshake_on_connect=False
            )
            connection.sock = secure
            secure.do_handshake()
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", target, body.encode(), headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        if time.monotonic() >= ends:
            raise TimeoutError(f"no answer within {TIMEOUT_S:g} s") from None
        raise
    finally:
        watch.cancel()
        connection.close()


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """End a connection that another thread is reading from."""
    with suppress(OSError, AttributeError):  # it was closed just now
        # The plain method also for TLS, whose state the other thread is using.
        socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)


class Deliveries:
    """Threads that deliver events, one for each webhook: a slow receiver delays only its own.

    Args:
        store: the database.
        private: allow this machine and its network.
    """

    def __init__(self, store: Store, *, private: bool) -> None:
        self._store = store
        self._private = private
        self._pool = ThreadPoolExecutor(MAX_SENDERS, thread_name_prefix="webhook")
        self._busy: dict[str, Future[None]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """End the threads after a block; what is not delivered by then is later."""
        try:
            yield
        finally:
            self._pool.shutdown(cancel_futures=True)

    def step(self) -> None:
        """Begin the deliveries whose time has come, at the webhook that has waited longest."""
        self._busy = {name: found for name, found in self._busy.items() if not found.done()}
        query = f"SELECT d.webhook {_DUE} GROUP BY d.webhook ORDER BY min(d.next_at)"
        with self._store.read() as db:
            names = [row["webhook"] for row in db.execute(query, _when())]
        for name in names:
            if name not in self._busy:
                self._busy[name] = self._pool.submit(self._deliver, name)

    def _deliver(self, webhook: str) -> None:
        """Attempt what is due at a webhook, until it fails or others are to have the thread."""
        ends = time.monotonic() + TIMEOUT_S
        query = f"SELECT d.*, w.url, w.secret {_DUE} AND d.webhook = ? ORDER BY d.seq LIMIT 1"
        try:
            while time.monotonic() < ends:
                with self._store.read() as db:
                    row = db.execute(query, (*_when(), webhook)).fetchone()
                if row is None or not self._attempt(row):
                    return
        # Such as a full disk: what could not be recorded is due again.
        except Exception:
            log.exception("webhook %s: the server failed; it tries again", webhook)

    def _attempt(self, row: sqlite3.Row) -> bool:
        """Attempt a delivery, and return whether it has arrived."""
        timestamp = now()
        headers = {
            "content-type": "application/json",
            "user-agent": "align-serve",
            "webhook-id": row["event"],
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(
                row["secret"], event=row["event"], timestamp=timestamp, body=row["body"]
            ),
        }
        try:
            status = send(row["url"], row["body"], headers, private=self._private)
            delivered = 200 <= status < 300
            problem = None if delivered else f"status {status}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            delivered, problem = False, str(error)
        self._record(row, delivered=delivered, problem=problem)
        return delivered

    def _record(self, row: sqlite3.Row, *, delivered: bool, problem: str | None) -> None:
        attempts = row["attempts"] + 1
        given_up = not delivered and attempts > len(WAITS_S)
        if problem:
            end = "given up" if given_up else "tried again later"
            log.warning("webhook %s: %s; %s", row["webhook"], problem, end)
        wait_s = WAITS_S[min(attempts, len(WAITS_S)) - 1]
        with self._store.write() as db:
            db.execute(
                "UPDATE deliveries SET attempts = ?, done = ?, next_at = ? WHERE seq = ?",
                (attempts, int(delivered or given_up), time.time() + wait_s, row["seq"]),
            )


_DUE = (
    "FROM deliveries d JOIN webhooks w ON w.id = d.webhook"
    # Later than ever planned: the clock was ahead then.
    " WHERE d.done = 0 AND (d.next_at <= ? OR d.next_at > ?)"
)


def _when() -> tuple[float, float]:
    """Return the values of ``_DUE``."""
    return time.time(), time.time() + max(WAITS_S)


def _check_url(url: str, *, private: bool) -> None:
    """Raise if a URL is not one that events may be sent to."""
    try:
        parts = urlsplit(url)
        port = parts.port or 443
    except ValueError as error:
        raise ServeError(400, f"url: {error}", param="url") from None
    schemes = ("https", "http") if private else ("https",)
    if parts.scheme not in schemes or not parts.hostname or parts.username is not None:
        expected = " or ".join(f"{scheme}://HOST/PATH" for scheme in schemes)
        raise ServeError(400, f"url: expected {expected} without a password", param="url")
    if not url.isascii() or any(c <= " " for c in url):
        raise ServeError(400, "url: expected ASCII without spaces", param="url")
    try:
        public_address(parts.hostname, port, private=private)
    except BlockedAddressError as error:
        raise ServeError(400, f"url: {error}. See --private-webhooks.", param="url") from None
    except (OSError, UnicodeError):  # a name that does not resolve now may do so later
        return


def add_webhooks(routes: APIRouter, api: Api) -> None:
    """Add the routes below /v1/webhooks, which OpenAI has in its dashboard."""
    me = api.me

    def shown(row: sqlite3.Row) -> dict[str, Any]:
        return {
            "id": row["id"],
            "object": "webhook",
            "created_at": row["created_at"],
            "url": row["url"],
            "events": json.loads(row["events"]),
        }

    @routes.post("/webhooks")
    def create(asked: WebhookRequest, person: Annotated[Person, me]) -> dict[str, Any]:
        _check_url(asked.url, private=api.settings.private_webhooks)
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        name = new_id("wh")
        with api.store.write() as db:
            query = "SELECT count(*) FROM webhooks WHERE owner = ?"
            if db.execute(query, (person.id,)).fetchone()[0] >= MAX_HOOKS:
                raise ServeError(400, f"You have {MAX_HOOKS} webhooks. Delete one.")
            db.execute(
                "INSERT INTO webhooks (id, owner, url, secret, events, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (name, person.id, asked.url, secret, json.dumps(asked.events), now()),
            )
            return {**shown(owned(db, "webhooks", person, name=name)), "secret": secret}

    @routes.get("/webhooks")
    def list_(person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.read() as db:
            where = {"owner": person.id}
            return list_page(db, "webhooks", shown, where=where, after=None, limit=MAX_HOOKS)

    @routes.delete("/webhooks/{name}")
    def delete(name: str, person: Annotated[Person, me]) -> dict[str, Any]:
        with api.store.write() as db:
            owned(db, "webhooks", person, name=name)
            db.execute("DELETE FROM deliveries WHERE webhook = ?", (name,))
            db.execute("DELETE FROM webhooks WHERE id = ?", (name,))
        return {"id": name, "object": "webhook", "deleted": True}
