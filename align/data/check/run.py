"""Check a data source in batches, on all cores if it is large, and summarize the result."""

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from align.core.errors import DataError
from align.data.check.batch import Batch, BatchChecker, Part, Plan, Source, finding_of
from align.data.check.findings import Finding, Tally
from align.data.check.kinds import HEAD_ROWS, infer
from align.data.check.others import evaluation_prompts, heldout_keys, texts_at
from align.data.check.whole import (
    join,
    look_at_all,
    look_at_balance,
    look_for_evaluation,
    look_for_near_copies,
)
from align.data.reading.readers import reader_of
from align.data.reading.sources import find_files, suffix_of
from align.data.render.chat import ChatFormat
from align.data.whole import WholeSource

PARALLEL_BYTES = 2**24
"""Smaller sources are checked in this process, since starting workers would cost more."""
LOST_FRAC = 0.01
"""Fraction of rows that may be longer than max_length; the default of the stages."""
STDIN = "<stdin>"


@dataclass(frozen=True, slots=True)
class Request:
    """What to check.

    Attributes:
        path: as in a recipe: file, folder, glob or hub id.
        stdin: a file with the content of standard input, used instead of ``path``.
        kind: sft, preference, unpaired, prompts, math or corpus; None infers it.
        form: the name of a format, or ``auto``.
        rename: fields to rename, {old: new}.
        map: function applied to each row first, as in a recipe.
        chat: creates the renderer of a model; None skips the token checks.
        max_length: tokens.
        heldout: sources that must not share prompts with the data.
        evaluation: sources that must not share text with the data.
        limit: number of findings kept per code.
    """

    path: str
    stdin: Path | None = None
    kind: str | None = None
    form: str = "auto"
    rename: Mapping[str, str] = field(default_factory=dict)
    map: str | None = None
    chat: Callable[[], ChatFormat] | None = None
    max_length: int | None = None
    heldout: Sequence[str] = ()
    evaluation: Sequence[str] = ()
    limit: int = 5


@dataclass(slots=True)
class Report:
    """Result of a data check.

    ``lengths`` are the characters of each valid row, ``tokens`` those of each example (with a
    model).
    """

    path: str
    kind: str
    tally: Tally
    files: list[str] = field(default_factory=list)
    rows: int = 0
    good: int = 0
    barren: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    labels: Counter[bool] = field(default_factory=Counter)
    longer: Counter[str] = field(default_factory=Counter)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    tokens: list[int] = field(default_factory=list)
    lost: int = 0
    notes: list[str] = field(default_factory=list)
    whole: WholeSource = field(default_factory=WholeSource)


def check_data(request: Request, *, progress: Callable[[int, int], Any] | None = None) -> Report:
    """Check a data source.

    Args:
        request: what to check.
        progress: called with the (bytes, rows) checked since its last call.

    Raises:
        DataError: ``heldout`` or ``evaluation`` cannot be read.
    """
    tally = Tally(request.limit)
    report = Report(request.path, request.kind or "", tally)
    sources = _sources(request, tally)
    report.files = [source.name for source in sources]
    if not sources:
        return report
    plan = _plan(request, sources)
    report.kind = plan.kind
    parts = []
    for part in _checked(sources, plan, size=_size(sources)):
        parts.append(part)
        _add(report, part)
        if progress:
            progress(part.size, part.rows)
    # A file without rows may still have been read without an error.
    for name in report.files:
        if not any(part.rows for part in parts if part.name == name):
            tally.add(Finding("D012", name, "no rows"))
    # Checks over all rows: duplicates, held-out prompts, near copies, balance.
    rows = join(parts, {source.name: source.counted for source in sources})
    report.good, report.lengths = len(rows.table), rows.column("length")
    heldout = heldout_keys(request.heldout)
    look_at_all(rows, tally, heldout=heldout)
    look_for_evaluation(plan.evaluation, [row for part in parts for row in part.overlap], tally)
    note = look_for_near_copies(
        rows,
        tally,
        lambda ids: texts_at(ids, rows, sources=sources, plan=plan),
        same_prompt=plan.kind not in ("preference", "unpaired"),
    )
    report.notes += [note] if note else []
    _look_at_sums(report, request)
    return report


def _sources(request: Request, tally: Tally) -> list[Source]:
    """Return the files and their readers; files that cannot be read become findings."""
    if request.stdin is not None:
        found = [(request.stdin, STDIN, "")]
    else:
        try:
            files = find_files(request.path)
        except DataError as error:
            tally.add(finding_of(error, request.path, request.path))
            return []
        if not files:
            # No file has this name: it is a dataset of the hub.
            return [Source(None, request.path, "hub", request.map)]
        found = [(file, str(file), suffix_of(file)) for file in files]
    sources = []
    for path, name, suffix in found:
        try:
            reader = reader_of(path, name=name, suffix=suffix)
            sources.append(Source(path, name, reader, request.map))
        except DataError as error:
            tally.add(finding_of(error, name, name))
    return sources


def _size(sources: Sequence[Source]) -> int:
    return sum(source.path.stat().st_size for source in sources if source.path)


def _plan(request: Request, sources: Sequence[Source]) -> Plan:
    kind, expected = request.kind, {}
    for source in sources:
        # The first file decides the kind; every file has its own expected format.
        head = list(islice(source.items(), HEAD_ROWS))
        reading = infer(head, form=request.form, rename=request.rename, kind=kind)
        kind = reading.kind
        if reading.form is not None and request.form == "auto":
            expected[source.name] = reading.form
    return Plan(
        kind=kind or "sft",
        form=request.form,
        rename=request.rename,
        expected=expected,
        limit=request.limit,
        evaluation=evaluation_prompts(request.evaluation),
        chat=request.chat,
        max_length=request.max_length,
    )


_checker: BatchChecker | None = None
"""The checker of a worker process, kept for the lifetime of the process."""


def _start(plan: Plan) -> None:
    global _checker
    _checker = BatchChecker(plan)


def _check(batch: Batch) -> Part:
    assert _checker is not None
    return _checker.check(batch)


def _checked(sources: Sequence[Source], plan: Plan, *, size: int) -> Iterator[Part]:
    """Yield the result of each batch, in order."""
    batches = (batch for source in sources for batch in source.batches())
    workers = len(os.sched_getaffinity(0))
    if size < PARALLEL_BYTES or workers < 2:
        yield from map(BatchChecker(plan).check, batches)
        return
    # Fork: the plan contains objects that cannot be pickled, and no threaded library is loaded
    # here. Not multiprocessing's Pool, which waits forever for a process that was killed.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (plan,))
    try:
        waiting: deque[Future[Part]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_check, batch))
            # A bounded queue: results come in order, and memory does not grow with the file.
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"{', '.join(source.name for source in sources)}: a process that checked rows was "
            "killed, probably for lack of memory. Free memory, or check fewer files at a time"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _add(report: Report, part: Part) -> None:
    report.tally.merge(part.tally)
    report.rows += part.rows
    report.barren += part.barren
    report.forms += part.forms
    report.roles += part.roles
    report.labels += part.labels
    report.longer += part.longer
    report.tokens += part.tokens
    report.lost += part.lost
    report.whole.join(part.whole)


def _look_at_sums(report: Report, request: Request) -> None:
    name = request.path if request.stdin is None else STDIN
    look_at_balance(
        report.tally,
        kind=report.kind,
        name=name,
        rows=report.rows,
        labels=report.labels,
        longer=report.longer,
    )
    for code, found in report.whole.faults():
        report.tally.add(Finding(code, name, found))
    for found in report.whole.unused_verdicts() if report.kind == "sft" else ():
        report.tally.add(Finding("D084", name, found))
    count = len(report.tokens)
    if report.lost > LOST_FRAC * count:
        found = (
            f"{report.lost} of {count} are longer than max_length {request.max_length}; "
            f"stages allow {LOST_FRAC:.0%} (max_lost_frac)"
        )
        report.tally.add(Finding("D114", request.path, found))
