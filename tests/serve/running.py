"""A real server on a free port of the loopback interface, in a thread of the test."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import OpenAI

from align.serve.app import create_app
from align.serve.services import Services
from align.serve.settings import Settings

WAIT_S = 120


@dataclass
class Running:
    """A running server: its address, services, a token, and what uvicorn runs."""

    url: str
    services: Services
    token: str
    app: Any

    def client(self, *, token: str | None = None, **options: Any) -> httpx.Client:
        """Return a client that sends the token."""
        headers = {"authorization": f"Bearer {token or self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=WAIT_S, **options)

    def openai(self, *, token: str | None = None, max_retries: int = 2) -> OpenAI:
        """Return the official client."""
        url = f"{self.url}/v1"
        return OpenAI(
            base_url=url, api_key=token or self.token, timeout=WAIT_S, max_retries=max_retries
        )

    @contextmanager
    def browser(self) -> Iterator[httpx.Client]:
        """Yield a client that is logged in by the printed address, as a browser is."""
        with httpx.Client(base_url=self.url, timeout=WAIT_S) as client:
            code = self.services.auth.login_code()
            assert client.get("/login", params={"code": code}).status_code == 200
            yield client

    def csrf(self, browser: httpx.Client) -> str:
        """Return the CSRF token that a page shows to this browser."""
        page = browser.get("/login").text
        return page.partition('name="csrf" value="')[2].partition('"')[0]


@contextmanager
def running(
    runs: Path, *, wrap: Callable[[Any], Any] = lambda app: app, **settings: Any
) -> Iterator[Running]:
    """Yield a server that is stopped at the end of the block; ``wrap`` wraps its application."""
    listener = socket.create_server(("127.0.0.1", 0))  # a port that nobody takes before the server
    port = listener.getsockname()[1]
    created = create_app(Settings(runs=runs, port=port, **settings))
    services, app = created.state.services, wrap(created)
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        token = services.auth.new_token("tester")
        yield Running(f"http://127.0.0.1:{port}", services, token, app)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
