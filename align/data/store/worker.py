"""A process that renders and tokenizes examples of a store: ``python -m align.data.store.worker``.

It gets ranges of a file of examples on its standard input and answers with columns on its standard
output; it ends when its input does.
"""

import gc
import logging
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from align.core.errors import AlignError
from align.core.extras import as_if_absent
from align.core.types import Example
from align.data.render.chat import ChatFormat
from align.data.store.collect import collected
from align.data.store.columns import Column, value_of
from align.data.store.layout import Done, Job, pack_rows
from reward_models.limits import many_rows


def tokenized(job: Job, examples: Column, render: Callable[[Example], Any]) -> Done:
    """Return the rows of a chunk."""
    data = examples.read(job.start, sum(job.sizes))
    ends = list(accumulate(job.sizes, initial=0))
    records = [data[start:end] for start, end in pairwise(ends)]
    lines: list[tuple[int, str]] = []
    try:
        with collected(lines), many_rows():
            rows = _rows(records, render)
    except AlignError as error:
        return Done(None, error, lines)
    return Done(pack_rows(rows), None, lines)


def _rows(records: Sequence[bytes], render: Callable[[Example], Any]) -> list[Any]:
    chat = getattr(render, "__self__", None)
    if isinstance(chat, ChatFormat) and render == chat.sft_row:
        # Together it is faster. One by one, the first invalid row is the one that is reported.
        with suppress(AlignError):
            return chat.sft_rows([value_of(data) for data in records])
    return [render(value_of(data)) for data in records]


def needs_torch(render: Callable[[Example], Any]) -> bool:
    """Return whether a renderer may need torch: any but ours, with a tokenizer of transformers."""
    chat = getattr(render, "__self__", None)
    if type(chat) is not ChatFormat:
        return True
    return type(chat.tokenizer).__module__.partition(".")[0] != "transformers"


def main() -> None:
    """Answer until the input ends."""
    # Libraries may print; the answers have the output for themselves.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        logging.getLogger("align").setLevel(logging.INFO)
        # transformers imports torch with every tokenizer, for weights in the format GGUF.
        keeps_torch = pickle.load(sys.stdin.buffer)
        with nullcontext() if keeps_torch else as_if_absent("torch"):
            render, path = pickle.load(sys.stdin.buffer)
        examples = Column(Path(path))
        # Collections within a chunk mostly look through what was imported, and find nothing.
        gc.freeze()
        gc.disable()
        while True:
            try:
                job = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump(tokenized(job, examples, render), out, protocol=5)
            out.flush()
            gc.collect()


if __name__ == "__main__":
    main()
