"""Check one batch of rows; only the place and six hashes of each row are kept."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np

from align.core.errors import DataError
from align.core.types import Example
from align.data.check.findings import Finding, Tally
from align.data.check.row_rules import doubts
from align.data.check.text_rules import text_faults
from align.data.check.tokens import TokenRules
from align.data.formats.detect import FormatDetector, Kind, to_examples
from align.data.formats.turns import text_of
from align.data.load import rename_fields
from align.data.own_map import map_rows
from align.data.reading.files import blocks
from align.data.reading.json import Item, Row, parse_lines
from align.data.reading.readers import READERS
from align.data.reading.sources import scan_rows
from align.data.render.chat import ChatFormat
from align.data.split import split_key
from align.data.text.contamination import Wanted, runs_in
from align.data.text.ngrams import sketch, words
from align.data.whole import WholeSource

COLUMNS = ("place", "whole", "key", "ident", "same", "low", "high", "length")
"""Columns for each valid row: its line or row number; hashes of all its texts, of the text that
determines its split, of its id, and of the part that contradicting rows share; its sketch; its
number of characters. A hash of 0 means none."""

_IDENTS = ("id", "uid", "uuid", "row_id", "_id")
_EXCERPT = 90
_PLACE = re.compile(r"(?::(\d+|row \d+))?(?::(\d+))?: ")
_BLANK = re.compile(rb"^[ \t\r]*\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings that apply to every batch."""

    kind: str
    form: str
    rename: Mapping[str, str]
    expected: Mapping[str, str]
    """Format of each file by its name, where known."""
    limit: int
    evaluation: Sequence[Wanted] = ()
    """Prompts of evaluation sets that must not occur in the rows."""
    chat: Callable[[], ChatFormat] | None = None
    """Creates the renderer in the process that needs it; None skips token checks."""
    max_length: int | None = None

    @property
    def load_kind(self) -> Kind:
        """Return the kind as which a stage would load the rows."""
        return cast(Kind, "prompts" if self.kind == "math" else self.kind)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one file: a block of JSON Lines that starts at line ``first``, or parsed rows."""

    name: str
    payload: bytes | list[Item]
    first: int = 1
    size: int = 0
    """Bytes that the batch takes in the file, for the progress bar."""


@dataclass(slots=True)
class Part:
    """Result of checking one batch."""

    name: str
    tally: Tally
    size: int = 0
    rows: int = 0
    barren: int = 0
    """Valid rows without an example, such as responses that all have the same score."""
    table: np.ndarray = field(default_factory=lambda: np.zeros((0, len(COLUMNS)), np.uint64))
    forms: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    labels: Counter[bool] = field(default_factory=Counter)
    longer: Counter[str] = field(default_factory=Counter)
    """Number of pairs whose chosen, or rejected, response has more words."""
    tokens: list[int] = field(default_factory=list)
    lost: int = 0
    whole: WholeSource = field(default_factory=WholeSource)
    overlap: list[Wanted] = field(default_factory=list)
    """Rows that share runs of words with evaluation prompts: their places and these runs."""


class BatchChecker:
    """Check batches with one plan; a worker process creates one checker and keeps it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._wanted = frozenset[int]().union(*(runs for _, runs in plan.evaluation))
        self._tokens = TokenRules(plan.chat(), plan.max_length, plan.kind) if plan.chat else None

    def check(self, batch: Batch) -> Part:
        """Check a batch."""
        plan = self._plan
        part = Part(batch.name, Tally(plan.limit), size=batch.size)
        detector = FormatDetector(plan.form, kind=plan.load_kind)
        if batch.name in plan.expected:
            detector.expect(batch.name, plan.expected[batch.name])
        items = batch.payload
        # Blocks are parsed here, in the worker, since parsing takes most of the time.
        if isinstance(items, bytes):
            _look_for_blank_lines(part, items, batch.first)
            items = parse_lines(items, batch.first, batch.name)
        table = []
        for row, source in items:
            part.rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                row = rename_fields(row, plan.rename, source=source)
                form = detector.format_of(row, source)
                examples = to_examples(row, kind=plan.load_kind, format=form, source=source)
            except DataError as error:
                part.tally.add(finding_of(error, batch.name, source, row=row))
                continue
            if examples:
                table.append(self._look(part, examples, source))
            else:
                part.barren += 1
        if table:
            part.table = np.array(table, dtype=np.uint64)
        part.forms = detector.counts
        return part

    def _look(self, part: Part, examples: list[Example], source: str) -> tuple[int, ...]:
        """Check a row that a stage would accept for warnings, and return its entry of the table."""
        for example in examples:
            part.whole.add(example)
            for code, found in doubts(example, kind=self._plan.kind):
                part.tally.add(Finding(code, source, found, excerpt=_first_text(example)))
            sides = [
                text_of(example.prompt),
                text_of(example.completion),
                text_of(example.rejected),
            ]
            _count(part, example, sides)
            if self._tokens:
                self._look_at_tokens(part, example, source)
        whole = row_text(examples)
        special = self._tokens.special if self._tokens else None
        for code, found in text_faults(whole, special=special):
            part.tally.add(Finding(code, source, found, excerpt=_clipped(whole)))
        hashes = words(whole)
        for example in examples if self._wanted else ():
            if runs := runs_in(example, self._wanted):
                part.overlap.append((source, runs))
        # A row that gives several examples has no single label and cannot contradict another row.
        only = examples[0] if len(examples) == 1 else None
        label = str(only.label) if only else ""
        place = int(source.rpartition(":")[2].removeprefix("row "))
        return (
            place,
            hash64(f"{whole}\0{label}"),
            hash64(split_key(examples[0])),
            _ident(examples[0]),
            _same(only),
            *sketch(hashes),
            len(whole),
        )

    def _look_at_tokens(self, part: Part, example: Example, source: str) -> None:
        assert self._tokens is not None
        length, found = self._tokens.look(example)
        part.tokens.append(length)
        if found:
            part.lost += found[0] in ("D110", "D111")
            part.tally.add(Finding(found[0], source, found[1], excerpt=_first_text(example)))


def finding_of(
    error: DataError, name: str, source: str, *, row: Row | DataError | None = None
) -> Finding:
    """Return the finding of an error; the place at the beginning of its message is removed.

    Args:
        error: the exception.
        name: the file.
        source: the place, used if the message does not name one.
        row: the row as read, for the excerpt.
    """
    found, column = str(error), None
    if found.startswith(name) and (match := _PLACE.match(found, len(name))):
        place, at = match.groups()
        source = f"{name}:{place}" if place else name
        column = int(at) if at else None
        found = found[match.end() :]
    excerpt = "" if row is None or isinstance(row, DataError) else _clipped(_shown(row))
    return Finding(error.code or "D040", source, found, column=column, excerpt=excerpt)


def hash64(text: str) -> int:
    """Return a 64-bit hash of a text, never 0, the same on every machine."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def row_text(examples: Sequence[Example]) -> str:
    """Return all texts of a row, joined."""
    return "\n".join(
        text_of(side)
        for example in examples
        for side in (example.prompt, example.completion, example.rejected)
    )


def _same(only: Example | None) -> int:
    """Return a hash of the part that two contradicting rows share."""
    if only is None:
        return 0
    texts = [text_of(side) for side in (only.prompt, only.completion, only.rejected)]
    # The same prompt and responses, in either order: then the labels contradict each other.
    if only.rejected is not None:
        return hash64("\0".join([texts[0], *sorted(texts[1:])]))
    return hash64("\0".join(texts)) if only.label is not None else 0


def _ident(example: Example) -> int:
    value = next((example.columns[name] for name in _IDENTS if name in example.columns), None)
    return 0 if value is None or value == "" else hash64(str(value))


def _count(part: Part, example: Example, sides: list[str]) -> None:
    for text in (example.prompt, example.completion):
        if text and not isinstance(text, str):
            for turn in text:
                part.roles[turn["role"]] += 1
    if example.label is not None:
        part.labels[example.label] += 1
    if example.rejected is not None:
        chosen, rejected = (len(side.split()) for side in sides[1:])
        if chosen != rejected:
            part.longer["chosen" if chosen > rejected else "rejected"] += 1


def _look_for_blank_lines(part: Part, block: bytes, first: int) -> None:
    if b"\n\n" not in block and not _BLANK.search(block):
        return
    for blank in _BLANK.finditer(block):
        line = first + block.count(b"\n", 0, blank.start())
        part.tally.add(Finding("D038", f"{part.name}:{line}", "a blank line"))


def _first_text(example: Example) -> str:
    return _clipped(text_of(example.prompt) or text_of(example.completion))


def _shown(row: Row) -> str:
    return row if isinstance(row, str) else json.dumps(row, ensure_ascii=False, default=str)


def _clipped(text: str) -> str:
    line = " ".join(text[: 2 * _EXCERPT].split())
    return line if len(line) <= _EXCERPT else line[: _EXCERPT - 3] + "..."


BATCH_ROWS = 2000


@dataclass(frozen=True, slots=True)
class Source:
    """One file: its path (None for the hub), its name in messages, its reader and its ``map``."""

    path: Path | None
    name: str
    reader: str
    map: str | None = None

    @property
    def counted(self) -> bool:
        """Return whether places are row numbers instead of line numbers."""
        return self.reader in ("parquet", "arrow", "hub")

    def items(self) -> Iterator[Item]:
        """Return an iterator over all rows."""
        rows = READERS[self.reader](self.path, self.name) if self.path else scan_rows(self.name)
        return map_rows(rows, self.map)

    @property
    def by_lines(self) -> bool:
        """Return whether the bytes of a line contain one row."""
        return self.reader == "lines" and self.path is not None and self.map is None

    def batches(self) -> Iterator[Batch]:
        """Yield the file in batches."""
        if not self.by_lines:
            items = self.items()
            while batch := list(islice(items, BATCH_ROWS)):
                yield Batch(self.name, batch)
            return
        assert self.path is not None
        for block, first in blocks(self.path, name=self.name):
            if isinstance(block, DataError):
                yield Batch(self.name, [(block, f"{self.name}:{first}")])
            else:
                yield Batch(self.name, block, first=first, size=len(block))
