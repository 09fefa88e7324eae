"""Sequences of rows and examples that are read from stores when they are asked for."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from align.core.types import Example, PromptRow
from align.data.fit import RowPlace, fit_row, place_of, report_fit
from align.data.split import split_key
from align.data.store.build import DIGEST, digest_of
from align.data.store.columns import Column, Mark, record, value_of
from align.data.store.layout import Row, filled, is_plain, sequences, side_of

Item = TypeVar("Item")
Ints = NDArray[Any]
CHUNK_TOKENS = 2**21
"""Tokens that are read at a time where all of them are looked at."""


class Part(Protocol):
    """Rows of one data source, with the examples behind them."""

    lengths: Ints
    """Tokens of each row; of a pair, those of its longer side."""
    is_plain: bool
    """Whether the loss depends on tokens and masks only."""
    fields: Sequence[str] | None
    """Sorted names of the columns of every example; None if they vary."""

    def row(self, place: int) -> Any:
        """Return a row."""
        ...

    def example(self, place: int) -> Example:
        """Return the example behind a row."""
        ...

    def identity(self) -> str:
        """Return a hash of the part's contents."""
        ...

    def having(self, keys: Set[str]) -> Iterator[int]:
        """Yield at least the places of the rows that have one of these split keys."""
        ...


class Listed:
    """A part whose rows are in memory."""

    def __init__(self, examples: Sequence[Example], render: Callable[[Example], Any]) -> None:
        self._examples, self._rows = examples, [render(example) for example in examples]
        self.lengths = np.array([place_of(row)[1] for row in self._rows], dtype=np.uint32)
        self.is_plain = all(map(is_plain, self._rows))
        fields = {tuple(sorted(example.columns)) for example in examples}
        self.fields: Sequence[str] | None = fields.pop() if len(fields) == 1 else None

    def row(self, place: int) -> Any:
        """Return a row."""
        return self._rows[place]

    def example(self, place: int) -> Example:
        """Return the example behind a row."""
        return self._examples[place]

    def identity(self) -> str:
        """Return a hash of the examples."""
        found = hashlib.sha256()
        for example in self._examples:
            found.update(record(example))
        return found.hexdigest()

    def having(self, keys: Set[str]) -> Iterator[int]:
        """Yield every place: an example in memory may have other identities than its text."""
        yield from range(len(self._examples))


class Store:
    """A part in the files of a folder; see `align.data.store.build`.

    Args:
        folder: of the store. meta: its description.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self._key = folder.name
        self._marks = {name: Mark(*mark) for name, mark in meta["columns"].items()}
        self._columns = {name: Column(folder / name) for name in self._marks}
        self._sides: int = meta["sides"]
        self.is_plain: bool = meta["is_plain"]
        self.fields: Sequence[str] | None = meta["fields"]
        sizes = self._columns["lengths"].array("<u4")
        # (rows, sides) -> (rows,): of a pair, the longer side.
        self.lengths = sizes.reshape(-1, self._sides).max(axis=1, initial=0)
        self._tokens = _starts(sizes)
        weighed = self._columns["weighed"].array(np.uint8)
        # Only sides with weights have them in the file, so these start at other places.
        self._weights = _starts(sizes * weighed) if weighed.any() else None
        self._shells = _starts(self._columns["shell_sizes"].array("<u4"))
        self._examples = _starts(self._columns["example_sizes"].array("<u4"))

    def is_whole(self) -> bool:
        """Return whether every file is as it was written."""
        return all(self._columns[name].has(mark) for name, mark in self._marks.items())

    def identity(self) -> str:
        """Return the key of the store."""
        return self._key

    def row(self, place: int) -> Any:
        """Return a row."""
        shell = self._record("shells", self._shells, place)
        first = place * self._sides
        return filled(shell, [self._side(side) for side in range(first, first + self._sides)])

    def example(self, place: int) -> Example:
        """Return the example behind a row."""
        return self._record("examples", self._examples, place)

    def having(self, keys: Set[str]) -> Iterator[int]:
        """Yield the places of rows with one of these split keys."""
        if not keys:
            return
        wanted = np.frombuffer(b"".join(map(digest_of, keys)), f"S{DIGEST}")
        places = np.isin(self._columns["keys"].array(f"S{DIGEST}"), wanted).nonzero()[0]
        for place in places.tolist():
            if split_key(self.example(place)) in keys:
                yield place

    def tokens(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """Return ids, mask and side lengths of neighboring rows, flat."""
        first, last = start * self._sides, stop * self._sides
        begin, end = int(self._tokens[first]), int(self._tokens[last])
        ids = np.frombuffer(self._columns["ids"].read(4 * begin, 4 * (end - begin)), "<u4")
        mask = np.frombuffer(self._columns["trained"].read(begin, end - begin), np.bool_)
        return ids, mask, np.diff(self._tokens[first : last + 1])

    def _side(self, side: int) -> tuple[tuple[int, ...], tuple[bool, ...], tuple[float, ...]]:
        begin, end = int(self._tokens[side]), int(self._tokens[side + 1])
        weights = b""
        if self._weights is not None:
            start, stop = int(self._weights[side]), int(self._weights[side + 1])
            weights = self._columns["weights"].read(8 * start, 8 * (stop - start))
        ids = self._columns["ids"].read(4 * begin, 4 * (end - begin))
        return side_of(ids, self._columns["trained"].read(begin, end - begin), weights)

    def _record(self, name: str, starts: Ints, place: int) -> Any:
        begin, end = int(starts[place]), int(starts[place + 1])
        return value_of(self._columns[name].read(begin, end - begin))


def _starts(sizes: Ints) -> Ints:
    """Return where each of some consecutive pieces begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


class _Chosen(Sequence[Item], Generic[Item]):
    """Places of parts, in any order and any number of times."""

    def __init__(self, parts: Sequence[Part], owners: Ints, places: Ints) -> None:
        self.parts, self.owners, self.places = parts, owners, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        """Return one item, or several of them as a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._item(self.parts[int(self.owners[index])], int(self.places[index]))

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    def _item(self, part: Part, place: int) -> Item:
        raise NotImplementedError


class StoredExamples(_Chosen[Example]):
    """Examples of a stage that are read from stores."""

    def _item(self, part: Part, place: int) -> Example:
        return part.example(place)

    def having(self, keys: Set[str]) -> Iterator[Example]:
        """Yield, in order, at least every example that has one of these split keys."""
        found = np.zeros(len(self), dtype=np.bool_)
        for number, part in enumerate(self.parts):
            mine = np.fromiter(part.having(keys), dtype=np.int64)
            found |= (self.owners == number) & np.isin(self.places, mine)
        for i in found.nonzero()[0].tolist():
            yield self[i]

    def identity(self) -> str:
        """Return a hash that equal examples in an equal order have."""
        found = hashlib.sha256()
        for part in self.parts:
            found.update(part.identity().encode())
        found.update(self.owners.tobytes() + self.places.tobytes())
        return found.hexdigest()

    def at(self, places: Ints) -> "StoredExamples":
        """Return some of the examples."""
        return StoredExamples(self.parts, self.owners[places], self.places[places])


class StoredRows(_Chosen[Any]):
    """Rows of a stage that are read from stores; those longer than ``max_length`` are cut.

    Args:
        parts: the data sources. owners, places: part of each row, and its place there.
        max_length: tokens; None cuts nothing.
        columns: names that every row's columns get; None is the value where a row lacks one.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        owners: Ints,
        places: Ints,
        *,
        max_length: int | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        super().__init__(parts, owners, places)
        self._max_length, self._columns = max_length, columns
        self.is_plain = all(part.is_plain for part in parts)

    def _item(self, part: Part, place: int) -> Any:
        row = part.row(place)
        if self._columns:
            row = with_columns(row, self._columns)
        if self._max_length is None or part.lengths[place] <= self._max_length:
            return row
        return fit_row(row, max_length=self._max_length)

    def with_same_columns(self) -> "StoredRows":
        """Return these prompts, all of which have the columns that any of them has."""
        fields = {None if part.fields is None else tuple(part.fields) for part in self.parts}
        # Prompts of one kind of file have the same columns; otherwise all prompts are read.
        same = fields.pop() if len(fields) == 1 else None
        names = sorted({name for row in self for name in row.columns}) if same is None else same
        limits = {"max_length": self._max_length, "columns": names}
        return StoredRows(self.parts, self.owners, self.places, **limits)

    @property
    def lengths(self) -> Ints:
        """Tokens of each row before it is cut; of a pair, those of its longer side."""
        found = np.zeros(len(self), dtype=np.uint32)
        for number, part in enumerate(self.parts):
            mine = self.owners == number
            found[mine] = part.lengths[self.places[mine]]
        return found

    def chunks(self) -> Iterator[tuple[int, Ints, Ints, Ints]]:
        """Yield the first row of a chunk, and flat ids, masks and side lengths of its rows."""
        at = 0
        limit = np.iinfo(np.int64).max if self._max_length is None else self._max_length
        while at < len(self):
            part, place = self.parts[int(self.owners[at])], int(self.places[at])
            most = max(1, CHUNK_TOKENS // max(1, int(part.lengths[place])))
            # As many neighbors as are stored side by side are read at once.
            run = self._run(at, most)
            # A row that is cut has other tokens than the file, so a run ends before it.
            uncut = part.lengths[place : place + run] <= limit
            run = run if uncut.all() else int(uncut.argmin())
            if isinstance(part, Store) and run:
                yield at, *part.tokens(place, place + run)
                at += run
            else:
                yield at, *_flat(self[at])
                at += 1

    def _run(self, at: int, most: int) -> int:
        """Return how many rows from ``at`` on are neighbors in one part, at most ``most``."""
        owners, places = self.owners[at : at + most], self.places[at : at + most]
        apart = (owners != owners[0]) | (places != places[0] + np.arange(len(places)))
        return int(apart.argmax()) if apart.any() else len(places)

    def fit(
        self, *, max_length: int, max_lost_frac: float, what: str, ledger: Path | None
    ) -> tuple["StoredRows", Ints]:
        """Return the rows that fit, as ``fit_rows`` does, and their places among these rows."""
        lost: list[RowPlace] = []
        cut: list[RowPlace] = []
        keep = np.ones(len(self), dtype=np.bool_)
        for i in (self.lengths > max_length).nonzero()[0].tolist():
            row = self[i]
            keep[i] = fit_row(row, max_length=max_length) is not None
            (cut if keep[i] else lost).append(place_of(row))
        kept = keep.nonzero()[0]
        report_fit(
            (len(self), len(kept)),
            lost=lost,
            cut=cut,
            max_length=max_length,
            max_lost_frac=max_lost_frac,
            what=what,
            ledger=ledger,
        )
        fitting = self.owners[kept], self.places[kept]
        return StoredRows(self.parts, *fitting, max_length=max_length), kept


def with_columns(row: PromptRow, names: Sequence[str]) -> PromptRow:
    """Return a prompt with a value in each of these columns, which include its own."""
    if len(row.columns) == len(names):
        return row
    return replace(row, columns=dict.fromkeys(names) | dict(row.columns))


def _flat(row: Row) -> tuple[Ints, Ints, Ints]:
    sides = sequences(row)
    ids = np.array([token for side in sides for token in side.input_ids], dtype=np.uint32)
    trained = [t for side in sides for t in getattr(side, "trained", ())]
    # A prompt has no mask: none of it is trained.
    mask = np.array(trained or [False] * len(ids), dtype=np.bool_)
    return ids, mask, np.array([len(side.input_ids) for side in sides])
