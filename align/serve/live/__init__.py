"""Live pages of the runs: states, charts, samples and logs; stopping, resuming, comparing."""

from collections.abc import Iterator
from contextlib import contextmanager

from align.serve.live.pages import router
from align.serve.services import Services

__all__ = ["MIGRATIONS", "NAME", "background", "router"]
NAME = "live"
MIGRATIONS: tuple[str, ...] = ()


@contextmanager
def background(_services: Services) -> Iterator[None]:
    """Run nothing: everything is read from the runs' folders when a page asks."""
    yield
