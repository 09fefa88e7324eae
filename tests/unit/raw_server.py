"""A small HTTP server whose replies to POST are the bytes it is told, well formed or not."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def whole(body: Any, *, status: int = 200) -> bytes:
    """Write a reply; a body of bytes is sent as it is, any other as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


class Raw(ThreadingHTTPServer):
    """Answer GET with a status and POST with the parts that ``reply`` makes of a request.

    Attributes:
        pause_s: wait before each part after the first.
        seen: bodies of the requests. paths: theirs.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[Any], Iterator[bytes]], pause_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.pause_s = reply, pause_s
        self.seen: list[Any] = []
        self.paths: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.wfile.write(whole({"status": "ok"}))
        self.close_connection = True

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        try:
            for part in self.server.reply(body):
                self.wfile.write(part)
                time.sleep(self.server.pause_s)
        except OSError:  # the client has heard enough
            pass
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(reply: Callable[[Any], Iterator[bytes]], pause_s: float = 0.0) -> Iterator[Raw]:
    """Serve on a free port of this machine."""
    with Raw(reply, pause_s) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
