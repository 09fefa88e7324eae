"""Live pages of the runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import APIRouter

from align.serve.services import Services

NAME = "live"
MIGRATIONS: tuple[str, ...] = ()


def router(services: Services) -> APIRouter:
    """Return the routes of this area."""
    return APIRouter()


@contextmanager
def background(services: Services) -> Iterator[None]:
    """Run what belongs to this area while the server runs."""
    yield
