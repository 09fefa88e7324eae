"""A local server with the part of the hub's HTTP interface that an upload uses."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """What clients created and uploaded.

    Attributes:
        repos: repository to whether it is private. files: (repository, branch) to its files.
        tokens: the bearer tokens of all requests. refuse: answer every request with 401.
    """

    def __init__(self) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.messages: list[str] = []
        self.cards: list[str] = []
        self.refuse = False
        self.url = ""


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def _body(self) -> bytes:
            hub.tokens.add(self.headers.get("Authorization", ""))
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _say(self, found: Any, status: int = 200) -> None:
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            hub.objects[self.path.rsplit("/", 1)[1]] = self._body()
            self._say({})

        def do_GET(self) -> None:
            self._body()
            self._say({"error": "not found"}, 404)

        def do_POST(self) -> None:
            body = self._body()
            if hub.refuse:
                self._say({"error": "Invalid credentials"}, 401)
                return
            parts = self.path.strip("/").split("/")
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                hub.repos[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
                self._say({"url": f"{hub.url}/{repo}", "name": repo})
            elif "preupload" in parts:
                asked = json.loads(body)["files"]
                modes = {True: "lfs", False: "regular"}
                self._say(
                    {
                        "files": [
                            {
                                "path": f["path"],
                                "uploadMode": modes[f["path"].endswith((".safetensors", ".gguf"))],
                                "shouldIgnore": False,
                            }
                            for f in asked
                        ]
                    }
                )
            elif self.path.endswith("/info/lfs/objects/batch"):
                found = [
                    {**o, "actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]
                self._say({"transfer": "basic", "objects": found})
            elif self.path == "/api/validate-yaml":
                hub.cards.append(json.loads(body)["content"])
                self._say({"errors": [], "warnings": []})
            elif "branch" in parts:
                self._say({})
            elif "commit" in parts:
                self._commit(f"{parts[2]}/{parts[3]}", parts[-1], body)
            else:
                self._say({"error": f"unknown: {self.path}"}, 404)

        def _commit(self, repo: str, branch: str, body: bytes) -> None:
            files = hub.files.setdefault((repo, branch), {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            self._say({"commitUrl": f"{hub.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40})

    return Handler


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a hub on a free port of this machine."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
