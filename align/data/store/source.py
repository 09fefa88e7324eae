"""Load the rows of a stage from stores, which are built for its large data sources.

The key of a store covers all that its rows depend on: the bytes of the files, how the recipe reads
them, tokenizer and template, the code, and the versions of the libraries that tokenize.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from align.core.artifacts import file_sha256
from align.core.errors import DataError
from align.core.sources import extension_hashes
from align.core.types import Example
from align.data.fit import fit_row, fit_rows
from align.data.formats.detect import Kind
from align.data.load import (
    load_examples,
    load_one,
    mix,
    none_left,
    read_examples,
    sample,
    source_of,
    split_keys,
    with_labels_file,
)
from align.data.reading import read_log
from align.data.reading.bounds import is_large
from align.data.reading.sources import find_files, hub_files, open_once
from align.data.render.chat import ChatFormat
from align.data.render.token_text import plain_backend
from align.data.store.build import Render, build_store
from align.data.store.collect import collected
from align.data.store.columns import Mark, record
from align.data.store.folder import open_or_build, remove
from align.data.store.rows import Ints, Listed, Part, Store, StoredExamples, StoredRows
from align.recipe.schema import DataSpec
from reward_models.limits import many_rows

log = logging.getLogger(__name__)
KINDS = ("sft", "preference", "unpaired", "prompts", "steps", "classes")
"""Kinds of rows that stores have a layout for."""
_PACKAGES = ("transformers", "tokenizers", "jinja2", "numpy", "pyarrow", "align-suite")
_ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class Loaded:
    """Examples of a stage, and their rows if they come from stores."""

    examples: Sequence[Example]
    rows: StoredRows | None = None

    def sharing_prompts(self, others: Sequence[Example]) -> Iterable[Example]:
        """Return at least the examples that share the text of a split key with other examples."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.having(split_keys(others))
        return self.examples


def load_rows(
    specs: Sequence[DataSpec],
    *,
    kind: Kind,
    seed: int,
    render: Render,
    mix_cap: int | None = None,
    processes: int | None = None,
) -> Loaded:
    """Return the examples that ``load_examples`` returns; with rows if any source is large.

    Args:
        specs, kind, seed, mix_cap: see ``load_examples``.
        render: makes a row of an example.
        processes: see ``build_store``; None takes one for each core.

    Raises:
        DataError: see ``load_examples`` and ``render``; or the stores cannot be written.
    """
    # Inside the block a data set of the hub is opened once, to see how large it is and to read it.
    with open_once():
        named = [with_labels_file(spec, kind) for spec in specs]
        files = [_large_files(spec, kind=kind, render=render) for spec in named]
        if not any(files):
            return Loaded(load_examples(specs, kind=kind, seed=seed, mix_cap=mix_cap))
        load = partial(_part, kind=kind, seed=seed, render=render, processes=processes)
        found = [load(*both, index=i) for i, both in enumerate(zip(named, files, strict=True))]
    parts = [part for part, _ in found]
    # Stored and listed rows are mixed alike: by their numbers, without reading a row.
    mixed = mix([len(kept) for _, kept in found], specs, seed=seed, mix_cap=mix_cap)
    places = [kept[chosen] for (_, kept), chosen in zip(found, mixed, strict=True)]
    owners = np.repeat(np.arange(len(parts), dtype=np.uint16), list(map(len, places)))
    joined = np.concatenate(places).astype(np.int64)
    return Loaded(StoredExamples(parts, owners, joined), StoredRows(parts, owners, joined))


def fit_loaded(
    loaded: Loaded,
    *,
    render: Render,
    max_length: int,
    max_lost_frac: float,
    what: str,
    ledger: Path | None,
) -> tuple[Sequence[Any], Sequence[int] | Ints]:
    """Return the rows that fit, as ``fit_rows`` does, and the places of their examples."""
    limits: dict[str, Any] = {"max_length": max_length, "max_lost_frac": max_lost_frac}
    if loaded.rows is not None:
        return loaded.rows.fit(**limits, what=what, ledger=ledger)
    if not loaded.examples:
        return [], []
    with many_rows():
        rows = [render(example) for example in loaded.examples]
    kept, _ = fit_rows(rows, **limits, what=what, ledger=ledger)
    fits = [fit_row(row, max_length=max_length) is not None for row in rows]
    return kept, [i for i, stays in enumerate(fits) if stays]


def chosen(examples: Sequence[Example], places: Sequence[int] | Ints) -> Sequence[Example]:
    """Return some of the examples."""
    if isinstance(examples, StoredExamples):
        return examples.at(np.asarray(places, dtype=np.int64))
    return [examples[i] for i in places]


def _large_files(spec: DataSpec, *, kind: Kind, render: Render) -> list[Path]:
    """Return the files of a source whose rows have a store, else none."""
    if spec.path is None or kind not in KINDS:
        return []
    if (tokenizer := _tokenizer_of(render)) is None or plain_backend(tokenizer) is None:
        return []
    name = source_of(spec)[0]
    files = find_files(name) or hub_files(name)
    return files if is_large(files) else []


def _given(render: Render) -> tuple[Any, ...]:
    """Return what a renderer was given before it gets an example."""
    if isinstance(render, partial):
        return (*render.args, *render.keywords.values())
    return (getattr(render, "__self__", None),)


def _tokenizer_of(render: Render) -> Any:
    """Return the tokenizer of a renderer; None if its rows may depend on something unknown."""
    first, *others = _given(render)
    # Text is all that a key covers beside the tokenizer; see ``_render_key``.
    known = all(isinstance(other, str) for other in others)
    tokenizer = first.tokenizer if isinstance(first, ChatFormat) else first
    return tokenizer if known else None


def _part(
    spec: DataSpec,
    files: Sequence[Path],
    *,
    index: int,
    kind: Kind,
    seed: int,
    render: Render,
    processes: int | None,
) -> tuple[Part, Ints]:
    """Return the rows of a source, and the places of those that its ``rows`` keeps."""
    if not files:
        listed = Listed(load_one(spec, kind=kind, seed=seed, index=index), render)
        return listed, np.arange(len(listed.lengths))
    store = _store(spec, files, kind=kind, seed=seed, render=render, processes=processes)
    kept = sample(len(store.lengths), spec, seed=seed, index=index)
    return store, np.arange(len(store.lengths)) if kept is None else kept


@dataclass(frozen=True, slots=True)
class _Origin:
    """What the rows of a store come from.

    Attributes:
        read: files with the rows, or the hub id, as ``read_log`` names them.
        hashes: sha256 of each file; for a hub id, of the files of the datasets library.
        made: hash of the examples if a function of the user makes them, else None.
    """

    read: Sequence[Path]
    hashes: Mapping[str, str]
    made: str | None

    def check(self, spec: DataSpec, examples: Mark) -> None:
        """Raise a DataError if the rows that were read are others than those of the key."""
        for file in self.read:
            parsed = read_log.parsed_sha256(file)
            if parsed != self.hashes.get(str(file), parsed):
                raise DataError(
                    f"{file}: changed while its rows were read. Do not change it during a run, and "
                    "run the command again"
                )
        if self.made not in (None, examples.hash):
            raise DataError(
                f"{spec.path}: map {spec.map}: made other rows when it was called again. What it "
                "makes of a row may depend on the row alone: give its random numbers a seed"
            )


def _origin(spec: DataSpec, files: Sequence[Path], *, kind: Kind, seed: int) -> _Origin:
    name = source_of(spec)[0]
    hashes = {str(file): read_log.expected(file) or file_sha256(file) for file in files}
    made = None
    if spec.map is not None:
        # The function may read anything, so only what it makes shows whether it is the same again.
        digest = xxhash.xxh3_128()
        for example in read_examples(spec, kind=kind, seed=seed):
            digest.update(record(example))
        made = digest.hexdigest()
    return _Origin(find_files(name) or [Path(name)], hashes, made)


def _store(
    spec: DataSpec,
    files: Sequence[Path],
    *,
    kind: Kind,
    seed: int,
    render: Render,
    processes: int | None,
) -> Store:
    """Return the store of a large source; it is built if it is missing or damaged."""
    origin = _origin(spec, files, kind=kind, seed=seed)
    key = _key(spec, origin, kind=kind, seed=seed, render=render)
    lines: list[tuple[int, str]] = []

    def build(folder: Path) -> dict[str, Any]:
        log.info("%s: tokenizing its rows into %s", spec.path, folder.parent / key)
        with collected(lines):
            meta = build_store(
                folder,
                read_examples(spec, kind=kind, seed=seed),
                render=render,
                processes=len(os.sched_getaffinity(0)) if processes is None else processes,
            )
        origin.check(spec, meta["columns"]["examples"])
        read = [[str(f), read_log.parsed_sha256(f), read_log.num_rows(f)] for f in origin.read]
        return {"source": spec.path, "kind": kind, **meta, "files": read, "log": lines}

    folder, meta = open_or_build(key, build)
    # A disk may have lost a part of what was written: it is made again once.
    if (store := _opened(folder, meta)) is None:
        log.warning("%s: damaged, so it is made again", folder)
        remove(folder)
        folder, meta = open_or_build(key, build)
        store = _opened(folder, meta)
    if store is None:
        raise DataError(f"{folder}: cannot be read back as it was written. Check the disk")
    if not lines and origin.made is None:
        # Warnings about the data belong to every run, also to one that did not parse it.
        _tell_again(meta)
    if not len(store.lengths):
        raise none_left(spec, kind)
    return store


def _opened(folder: Path, meta: Mapping[str, Any]) -> Store | None:
    """Return a store that is whole, else None."""
    try:
        store = Store(folder, meta)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return store if store.is_whole() else None


def _tell_again(meta: Mapping[str, Any]) -> None:
    """Log what was logged when a store was built, and note its files as read."""
    for level, line in meta["log"]:
        log.log(level, "%s", line)
    for path, sha256, num in meta["files"]:
        read_log.note(Path(path), sha256)
        read_log.note_rows(Path(path), num)


def _key(spec: DataSpec, origin: _Origin, *, kind: Kind, seed: int, render: Render) -> str:
    """Return the key of a source's store."""
    # Weight and the other ignored settings choose among rows and do not change them.
    read = spec.model_dump(mode="json", exclude={"weight", "rows"})
    template = None if spec.templates is None else file_sha256(Path(spec.templates))
    parts = {
        "files": list(origin.hashes.items()),
        "made": origin.made,
        "spec": read,
        "templates": [template, seed if spec.templates is not None else None],
        "kind": kind,
        "render": _render_key(render),
        "code": _code_key(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _render_key(render: Render) -> list[Any]:
    """Return what the rows depend on beside the examples."""
    tokenizer = _tokenizer_of(render)
    first, *others = _given(render)
    function = render.func if isinstance(render, partial) else render
    template = str(tokenizer.chat_template)
    return [
        function.__module__,
        function.__qualname__,
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        template,
        # A template may write the date into its text.
        datetime.now().astimezone().date().isoformat() if "strftime_now" in template else None,
        others,
        list(first.stop_token_ids) if isinstance(first, ChatFormat) else None,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]


@cache
def _code_key() -> list[str]:
    """Return the hash of this project's code and the versions of the libraries that it uses."""
    found = hashlib.sha256()
    for top in ("align", "reward_models"):
        for path in sorted((_ROOT / top).rglob("*.py")):
            found.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes() + b"\0")
    versions = [metadata.version(name) for name in _PACKAGES]
    return [found.hexdigest(), platform.python_version(), *versions, str(extension_hashes())]
