"""Collect what is logged while rows are read, to say it again when their store is used."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Collector(logging.Handler):
    def __init__(self, lines: list[tuple[int, str]]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.levelno, record.getMessage()))


@contextmanager
def collected(lines: list[tuple[int, str]]) -> Iterator[None]:
    """Add the level and the text of what is logged about data inside the block to ``lines``."""
    logger, handler = logging.getLogger("align.data"), _Collector(lines)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
