"""Preference labels by people, for the next stage of a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from align.serve.labels.tables import MIGRATIONS as MIGRATIONS

if TYPE_CHECKING:  # the command `align labels` works without the server's packages
    from fastapi import APIRouter

    from align.serve.services import Services

NAME = "labels"


def router(services: "Services") -> "APIRouter":
    """Return the routes of this area."""
    from align.serve.labels.routes import make_router

    return make_router(services)


@contextmanager
def background(services: "Services") -> Iterator[None]:
    """Run nothing: labels have no work of their own."""
    yield
