"""What every request passes first: the host it names, its size, and the headers of its answer."""

import ipaddress
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from align.serve.errors import ServeError
from align.serve.settings import Settings

log = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Refuse = Callable[[ServeError, str], App]
"""Return the application that answers a path with an error."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
FILES = ("/v1/files", "/v1/uploads")
"""Paths that receive files."""


class Guard:
    """Middleware that refuses foreign hosts and large bodies, and adds headers to every answer."""

    def __init__(self, app: App, *, settings: Settings, refuse: Refuse) -> None:
        self._app = app
        self._settings = settings
        self._refuse = refuse

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        bounded = _Bounded(receive, self._limit(scope["path"]))
        dressed = _dressed(send, scope)
        app = self._app
        if not is_known_host(headers.get("host", ""), self._settings.hosts):
            # A page of another site whose name was pointed at this address (DNS rebinding).
            problem = ServeError(
                421,
                f"Unknown host {headers.get('host', '')[:200]!r}. Use an address or localhost, or "
                "start the server with --allow-host NAME.",
            )
            app = self._refuse(problem, scope["path"])
        elif not bounded.fits(headers.get("content-length")):
            app = self._refuse(bounded.error(), scope["path"])
        await app(scope, bounded, dressed)

    def _limit(self, path: str) -> int:
        settings = self._settings
        mib = settings.file_mib if path.startswith(FILES) else settings.body_mib
        # Multipart adds some bytes around a file.
        return mib * 2**20 + 2**16


class _Bounded:
    """The body of a request, which raises once it is longer than its limit."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            raise self.error()
        return message

    def fits(self, length: str | None) -> bool:
        """Return whether a ``Content-Length`` is within the limit; without one, bytes count."""
        return length is None or (length.isdecimal() and int(length[:20]) <= self._limit)

    def error(self) -> ServeError:
        """Return the error of a body that is too long."""
        return ServeError(
            413,
            f"The request is larger than {self._limit // 2**20} MiB.",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _dressed(send: Send, scope: Message) -> Send:
    """Return a ``send`` that adds the headers of every answer."""
    extra = {**HEADERS, "x-request-id": f"req_{secrets.token_hex(16)}"}
    if scope["path"].startswith("/static/"):
        extra["cache-control"] = "public, max-age=3600"
    added = [(key.encode(), value.encode()) for key, value in extra.items()]

    async def dressed(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {key for key, _ in message["headers"]}
            more = [pair for pair in added if pair[0] not in present]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return dressed


def is_known_host(header: str, names: tuple[str, ...]) -> bool:
    """Return whether a ``Host`` header is an address, ``localhost`` or one of the names.

    Other sites can point names at this server, but a browser that was sent to an address sends
    the address.
    """
    name = header.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    if name == "localhost" or name in {known.lower() for known in names}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
