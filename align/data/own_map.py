"""A function of the user that makes of each row of a source a row, several rows or none (``map``).

It runs in its own process, ``python -m align.data.own_map``, where it may raise, print or exit. A
row for which it raises is an error at the place of the row; one for which it hangs ends the load.
"""

import json
import logging
import resource
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from align.core.errors import DataError
from align.data.reading.json import Item
from reward_models.base import a_type
from reward_models.worker import Worker, WorkerError, serve

log = logging.getLogger(__name__)
BATCH_ROWS = 256
DEADLINE_S, START_S = 60.0, 120.0
"""Seconds for a batch of rows, and for the import of the function's module."""
MEMORY = 8 * 2**30
"""Data segment of the process, in bytes."""


def map_rows(items: Iterable[Item], path: str | None) -> Iterator[Item]:
    """Yield what a function makes of each row, with the place of the row.

    Args:
        items: rows with their places; an error in place of a row is passed on.
        path: ``FILE.py:NAME`` or ``MODULE:NAME``; None yields the rows unchanged.

    Raises:
        DataError: the function cannot be loaded, or it hangs, exits or crashes on a row.
    """
    if path is None:
        yield from items
        return
    worker = Worker("align.data.own_map", [path], start_timeout_s=START_S, name="map")
    given = made = without = 0
    waiting = iter(items)
    try:
        while batch := list(islice(waiting, BATCH_ROWS)):
            for (row, source), reply in zip(batch, _asked(worker, path, batch), strict=True):
                given += 1
                if isinstance(row, DataError):
                    yield row, source
                elif "failed" in reply:
                    yield DataError(f"{source}: map {path}: {reply['failed']}", code="D046"), source
                else:
                    yield from ((new, source) for new in reply["rows"])
                    made, without = made + len(reply["rows"]), without + (not reply["rows"])
    finally:
        worker.close()
    log.info("map %s: %d rows became %d; %d became none", path, given, made, without)


def _asked(worker: Worker, path: str, batch: Sequence[Item]) -> list[dict[str, Any]]:
    """Return one reply per row; a batch that gets none is asked row by row, to name the row."""
    rows = [None if isinstance(row, DataError) else row for row, _ in batch]
    try:
        if (first := worker.start()) is not None and "failed" in first:
            raise DataError(f"map {path}: cannot be loaded: {first['failed']}", code="D046")
        return worker.ask({"rows": rows}, DEADLINE_S)
    except WorkerError as error:
        if len(batch) > 1:
            return [reply for item in batch for reply in _asked(worker, path, [item])]
        raise DataError(
            f"{batch[0][1]}: map {path}: {error}; expected a row, a list of rows or None within "
            f"{DEADLINE_S:g} s and {MEMORY // 2**30} GiB. Correct the function",
            code="D046",
        ) from None


# The process of the function.


def _prepare() -> tuple[Any, Callable[[Mapping[str, Any]], Any]]:
    # Here: who calls ``map_rows`` does not need it.
    from reward_models.own_process import load

    try:
        function = load(sys.argv[1], {})
    # Loading runs the user's module, which may raise anything; the parent reports it.
    except BaseException as error:
        return {"failed": _told(error)}, lambda request: []
    return {}, lambda request: [_mapped(function, row) for row in request["rows"]]


def _mapped(function: Callable[[Any], Any], row: object) -> dict[str, Any]:
    if row is None:
        return {}
    try:
        found: Any = function(row)
        if found is None:
            rows: list[Any] = []
        elif isinstance(found, str | Mapping) or not hasattr(found, "__iter__"):
            rows = [found]
        else:
            rows = list(found)
    # Whatever the function does, even exiting, is an error of its row.
    except BaseException as error:
        return {"failed": _told(error)}
    wrong = next((new for new in rows if not isinstance(new, Mapping)), None)
    if wrong is not None:
        kind = type(wrong).__name__
        return {"failed": f"returned a {kind}; expected a row (a dict), a list of rows or None"}
    try:
        # Here, so that a value that is not JSON is an error of its row.
        return {"rows": json.loads(json.dumps([dict(new) for new in rows], default=_plain))}
    except (TypeError, ValueError, RecursionError) as error:
        return {"failed": str(error)}


def _plain(value: Any) -> Any:
    """Return a scalar or an array of numpy as plain numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{a_type(value)} cannot be part of a row; expected JSON values")


def _told(error: BaseException) -> str:
    """Return an error with the line of the user's code where it was raised."""
    from reward_models.own_process import load

    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename not in (__file__, load.__code__.co_filename)]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}"[:500] + where


if __name__ == "__main__":
    serve(_prepare, limit=(resource.RLIMIT_DATA, MEMORY))
