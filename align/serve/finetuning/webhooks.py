"""Webhooks: who is told that a job has ended, signed as Standard Webhooks are.

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
import time
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter
from pydantic import Field

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.asked import Asked
from align.serve.finetuning.common import list_page, new_id, now, owned
from align.serve.finetuning.context import Api
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
TIMEOUT_S = 10.0
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
        OSError: there is no answer, or the address is blocked.
        http.client.HTTPException: the answer is not HTTP.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    address = public_address(host, port, private=private)
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    connection.sock = socket.create_connection((address, port), timeout=TIMEOUT_S)
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", target, body.encode(), headers)
        return connection.getresponse().status
    finally:
        connection.close()


def deliver_due(store: Store, *, private: bool) -> None:
    """Attempt every delivery whose time has come, one after the other."""
    query = (
        "SELECT d.*, w.url, w.secret FROM deliveries d JOIN webhooks w ON w.id = d.webhook"
        " WHERE d.done = 0 AND (d.next_at <= ?1 OR d.next_at > ?1 + ?2) ORDER BY d.seq LIMIT 20"
    )
    with store.read() as db:  # later than ever planned: the clock was ahead then
        due = db.execute(query, (time.time(), max(WAITS_S))).fetchall()
    for row in due:
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
            status = send(row["url"], row["body"], headers, private=private)
            delivered = 200 <= status < 300
            problem = None if delivered else f"status {status}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            delivered, problem = False, str(error)
        _record(store, row, delivered=delivered, problem=problem)


def _record(store: Store, row: sqlite3.Row, *, delivered: bool, problem: str | None) -> None:
    attempts = row["attempts"] + 1
    given_up = not delivered and attempts > len(WAITS_S)
    if problem:
        end = "given up" if given_up else "tried again later"
        log.warning("webhook %s: %s; %s", row["webhook"], problem, end)
    wait_s = WAITS_S[min(attempts, len(WAITS_S)) - 1]
    with store.write() as db:
        db.execute(
            "UPDATE deliveries SET attempts = ?, done = ?, next_at = ? WHERE seq = ?",
            (attempts, int(delivered or given_up), time.time() + wait_s, row["seq"]),
        )


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
