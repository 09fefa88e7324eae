"""Messages between rank 0's ``align run`` and those of the other ranks: JSON lines over TCP.

The messages name stages and ports and carry the text of logs. Like torch's own store, the channel
has no password: a run needs a network whose machines are trusted.
"""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

MAX_LINE = 2**20
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
"""Options of TCP with which a machine that lost power or network is noticed within 30 s."""


class Channel:
    """One connection, which sends and receives JSON objects."""

    def __init__(self, connection: socket.socket) -> None:
        """Make the loss of the other machine end the connection."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        connection.settimeout(None)
        self._connection = connection
        self._received = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send one message; to a lost connection, nothing: its reader learns of the loss."""
        with self._sending:
            try:
                self._connection.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                return

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next message, None if none comes in time."""
        self._connection.settimeout(timeout_s)
        found = next(self.messages(), None)
        self._connection.settimeout(None)
        return found

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield every message until the connection ends or something other than a message comes."""
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    return
                if not isinstance(found, dict):
                    return
                yield found
                continue
            try:
                block = self._connection.recv(2**16)
            except OSError:
                return
            if not block or len(self._received) > MAX_LINE:
                return
            self._received += block

    def close(self) -> None:
        """End the connection for both sides."""
        with suppress(OSError):  # the other side has ended it
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def listen(port: int) -> socket.socket:
    """Return a socket that accepts connections on every address of this machine."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError:  # no IPv6, or the port is in use: the socket below raises
            pass
    return socket.create_server(("", port))
