"""A small HTTP server that speaks the protocol of a judge's endpoint."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from reward_models.judge import Endpoint


class Server(ThreadingHTTPServer):
    """Answer chat requests with what ``reply`` makes of them: (status, message or error)."""

    reply: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.running = self.most_running = 0

    def endpoint(self, **changes: Any) -> Endpoint:
        url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        return Endpoint(**{"url": url, "model": "m", "retries": 2, **changes})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append(request)
            server.keys.append(self.headers.get("Authorization"))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        status, body = server.reply(request)
        with server.lock:
            server.running -= 1
        if status == 200:
            message = {"role": "assistant", "content": None, "refusal": None, **body}
            reason = message.pop("finish_reason", "stop")
            body = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [{"index": 0, "message": message, "finish_reason": reason}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running() -> Iterator[Server]:
    """Serve on a free port of this machine."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
