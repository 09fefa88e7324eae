"""A process that renders and tokenizes examples of a store: ``python -m align.data.store.worker``.

It gets ranges of a file of examples on its standard input and answers with columns on its standard
output; it ends when its input does.
"""

import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.core.errors import AlignError
from align.core.types import Example
from align.data.store.collect import collected
from align.data.store.columns import Column, value_of
from align.data.store.layout import Done, Job, pack_rows
from reward_models.limits import many_rows


def tokenized(job: Job, examples: Column, render: Callable[[Example], Any]) -> Done:
    """Return the rows of a chunk."""
    data = examples.read(job.start, sum(job.sizes))
    rows, at = [], 0
    lines: list[tuple[int, str]] = []
    try:
        with collected(lines), many_rows():
            for size in job.sizes:
                rows.append(render(value_of(data[at : at + size])))
                at += size
    except AlignError as error:
        return Done(None, error, lines)
    return Done(pack_rows(rows), None, lines)


def main() -> None:
    """Answer until the input ends."""
    # Libraries may print; the answers have the output for themselves.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        logging.getLogger("align").setLevel(logging.INFO)
        render, path = pickle.load(sys.stdin.buffer)
        examples = Column(Path(path))
        while True:
            try:
                job = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump(tokenized(job, examples, render), out, protocol=5)
            out.flush()


if __name__ == "__main__":
    main()
