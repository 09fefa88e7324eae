"""Read other datasets, or rows again, to compare them with the checked rows."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, cast

from align.core.errors import DataError
from align.core.types import Example
from align.data.check.batch import Plan, hash64, row_text
from align.data.check.kinds import HEAD_ROWS, infer
from align.data.check.whole import Rows
from align.data.formats.detect import Kind, detect, to_examples
from align.data.load import rename_fields
from align.data.own_map import map_rows
from align.data.reading.files import blocks
from align.data.reading.json import Item, parse_lines
from align.data.reading.sources import read_rows, scan_rows
from align.data.split import split_key
from align.data.text.contamination import Wanted, wanted_runs

if TYPE_CHECKING:
    from align.data.check.batch import Source


def heldout_keys(paths: Sequence[str]) -> dict[int, str]:
    """Return the hash of each row's split key in other sources, with its place."""
    keys: dict[int, str] = {}
    for example in _examples(paths):
        keys.setdefault(hash64(split_key(example)), example.source)
    return keys


def evaluation_prompts(paths: Sequence[str]) -> list[Wanted]:
    """Return the word runs of the evaluation prompts that are long enough to be compared."""
    return wanted_runs(_examples(paths))


def examples_of(
    path: str, *, kind: str | None, form: str, rename: Mapping[str, str], map: str | None = None
) -> Iterator[Example]:
    """Yield the examples of a source, read as the given kind or as the inferred one."""
    head = list(islice(map_rows(scan_rows(path), map), HEAD_ROWS))
    reading = infer(head, form=form, rename=rename, kind=kind)
    load_kind = cast(Kind, "prompts" if reading.kind == "math" else reading.kind)
    for row, source in map_rows(read_rows(path), map):
        if isinstance(row, DataError):
            raise row
        renamed = rename_fields(row, rename, source=source)
        yield from to_examples(renamed, kind=load_kind, format=form, source=source)


def _examples(paths: Sequence[str]) -> Iterator[Example]:
    for path in paths:
        head = list(islice(scan_rows(path), HEAD_ROWS))
        reading = infer(head, form="auto", rename={}, kind=None)
        kind = "corpus" if reading.kind == "corpus" else "prompts"
        yield from examples_of(path, kind=kind, form="auto", rename={})


def texts_at(
    ids: Sequence[int], rows: Rows, *, sources: Iterable["Source"], plan: Plan
) -> dict[int, str]:
    """Return the texts of some rows, which are read again."""
    # Texts were not kept in the first pass, which reads any size: few rows are read again.
    wanted: dict[str, dict[str, int]] = defaultdict(dict)
    for i in ids:
        wanted[rows.names[int(rows.file_ids[i])]][rows.source(i)] = i
    texts: dict[int, str] = {}
    for source in sources:
        places = wanted.get(source.name, {})
        for row, place in _items_at(source, places) if places else ():
            if place in places and not isinstance(row, DataError):
                row = rename_fields(row, plan.rename, source=place)
                form = plan.form
                if form == "auto":
                    form = detect(row, kind=plan.load_kind, source=place)
                found = to_examples(row, kind=plan.load_kind, format=form, source=place)
                texts[places[place]] = row_text(found)
    return texts


def _items_at(source: "Source", places: Mapping[str, int]) -> Iterator[Item]:
    """Yield the rows at some places; in JSON Lines, only those lines are parsed."""
    if not source.by_lines:
        yield from source.items()
        return
    assert source.path is not None
    # Walk through the file once, and parse only the wanted lines.
    lines = sorted(int(place.rpartition(":")[2]) for place in places)
    at = 0
    for block, first in blocks(source.path, name=source.name):
        if isinstance(block, DataError):
            return
        pieces = block.split(b"\n")
        while at < len(lines) and lines[at] < first + len(pieces) - (not pieces[-1]):
            piece = pieces[lines[at] - first]
            yield from parse_lines(piece, lines[at], source.name)
            at += 1
