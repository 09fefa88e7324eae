"""A plugin of pytest that prints how many requests `align serve` got in tests, and to which routes.

python -m pytest -v -p benchmarks.requests_seen tests/serve/test_conformance.py
"""

from collections import Counter
from functools import wraps
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

SEEN: Counter[str] = Counter()
"""Requests by route; those that fit none are under ``no route``."""
ROUTES: set[str] = set()
"""Routes of the API for clients, below ``/v1``."""


def routes_of(app: FastAPI) -> dict[Any, str]:
    """Return method and path of each route, by the function that answers it."""
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    return {route.endpoint: f"{'/'.join(sorted(route.methods))} {route.path}" for route in routes}


def pytest_configure() -> None:
    """Count each request of the servers in this process, whoever sent it."""
    call = FastAPI.__call__

    @wraps(call)
    async def counted(self: FastAPI, scope: Any, receive: Any, send: Any) -> None:
        try:
            await call(self, scope, receive, send)
        finally:
            if scope["type"] == "http":
                known = routes_of(self)
                SEEN[known.get(scope.get("endpoint"), "no route")] += 1
                ROUTES.update(route for route in known.values() if " /v1/" in route)

    FastAPI.__call__ = counted


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the numbers, and with ``-v`` each route with its requests."""
    found = len(ROUTES & SEEN.keys())
    terminalreporter.write_line(f"{SEEN.total()} requests, {found} of {len(ROUTES)} routes of /v1")
    if terminalreporter.config.get_verbosity() > 0:
        for route in sorted(ROUTES | SEEN.keys()):
            terminalreporter.write_line(f"  {SEEN[route]:5} {route}")
