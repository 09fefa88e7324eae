"""Load examples for a stage: read, rename, import, split, limit, mix."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from align.core.artifacts import file_sha256
from align.core.errors import DataError
from align.core.types import Example
from align.data.formats.detect import FormatDetector, Kind, to_examples
from align.data.formats.pairs import as_chat
from align.data.formats.turns import text_of
from align.data.labels import labels_file, snapshot_files
from align.data.own_map import map_rows
from align.data.reading.json import Row
from align.data.reading.read_log import num_rows, parsed_sha256
from align.data.reading.sources import data_fingerprint, named_source, read_rows
from align.data.split import side_of, split_key
from align.data.toy import generate
from align.data.whole import WholeSource, check_whole
from align.recipe.schema import DataSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MISSING = object()


def _nested(row: Mapping[str, Any], path: str) -> Any:
    """Return the value at ``outer.inner`` of a row; the outer field is kept."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
    return value


def rename_fields(row: Row, rename: Mapping[str, str], *, source: str) -> Row:
    """Return the row with its fields renamed ``{old: new}``; ``outer.inner`` names a nested field.

    Raises:
        DataError: a field is missing, or two fields would have the same name.
    """
    if not rename:
        return row
    if isinstance(row, str):
        raise DataError(f"{source}: 'rename' has no effect on plain text. Remove it.", code="D044")
    # A key that contains a dot itself takes precedence over a nested field.
    nested = {old: _nested(row, old) for old in rename if old not in row and "." in old}
    row = {**row, **{old: value for old, value in nested.items() if value is not _MISSING}}
    missing = sorted(set(rename) - set(row))
    if missing:
        message = f"{source}: rename: no field {missing}; the row has {sorted(row)}"
        raise DataError(message, code="D040")
    # After renaming, no two fields may have the same name: one would be lost.
    names = Counter(rename.get(key, key) for key in row)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        message = f"{source}: rename: {twice} would occur twice in {sorted(row)}"
        raise DataError(message, code="D042")
    return {rename.get(key, key): value for key, value in row.items()}


logger = logging.getLogger(__name__)

MAX_REPORTED = 20
MIN_REPEATED = 16
"""Characters of a prompt that a response does not begin with by chance."""


def load_examples(
    specs: Sequence[DataSpec], *, kind: Kind, seed: int, mix_cap: int | None = None
) -> list[Example]:
    """Load the rows of all specs into one deterministic list.

    Each spec is read in turn: ``map`` makes new rows, fields are renamed (``rename``), rows are
    converted to examples and split by the hash of the first user message. ``rows`` then keeps a
    seeded sample of that size, in file order. ``answers`` turns preference pairs into sft rows.

    ``weight`` sets the mixture. With n_i rows and weight w_i, let S be the largest n_i / w_i. The
    spec that attains S keeps each row once. Every other spec is expanded to round(w_i * S) rows:
    whole copies in order, then a seeded sample of the rest. A weight therefore never drops rows,
    and equal weights make the sets equally large. Without weights (all 1.0) the sets are
    concatenated. The result is not shuffled.

    Args:
        specs: data sources of the recipe.
        kind: what the stage needs of each row. ``prompts`` takes the prompt of any kind of row.
        seed: random seed of ``rows``, weights, wordings and synthetic data.
        mix_cap: weights are min(n_i, mix_cap), so sets count by their size up to a limit.

    Raises:
        DataError: rows are invalid (up to 20 are listed), or no rows are left.
    """
    parts = [load_one(spec, kind=kind, seed=seed, index=i) for i, spec in enumerate(specs)]
    places = mix(list(map(len, parts)), specs, seed=seed, mix_cap=mix_cap)
    return [part[i] for part, chosen in zip(parts, places, strict=True) for i in chosen.tolist()]


def mix(
    sizes: Sequence[int], specs: Sequence[DataSpec], *, seed: int, mix_cap: int | None
) -> "list[NDArray[np.int64]]":
    """Return the rows of each spec in the mixture of all; see ``load_examples``."""
    import numpy as np  # here, because ``align check`` reads the first rows without it

    weights = [spec.weight for spec in specs]
    if mix_cap is not None:
        weights = [float(min(size, mix_cap)) for size in sizes]
    elif all(weight == 1.0 for weight in weights):
        return [np.arange(size) for size in sizes]
    # The spec with the most rows per unit of weight keeps its rows; the others are repeated.
    scale = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    mixed = []
    for i, (size, spec, weight) in enumerate(zip(sizes, specs, weights, strict=True)):
        count = round(weight * scale)
        copies, rest = divmod(count, size)
        chosen = _chosen(size, rest, seed=seed, purpose=f"weight/{i}")
        mixed.append(np.concatenate([np.tile(np.arange(size), copies), chosen]))
        logger.info("%s: weight %g, %d rows become %d", _name(spec), weight, size, count)
    return mixed


def check_overlap(train: Iterable[Example], heldout: Iterable[Example]) -> None:
    """Raise if a prompt occurs on both sides of the split.

    Prompts are compared by the text that determines the split (the first user message or the text).
    Rows of synthetic tasks are also compared by their instance, whatever its wording.

    Raises:
        DataError: with the number of overlapping prompts and the first few places.
    """
    held = [(example.source, key) for example in heldout for key in _identities(example)]
    wanted = {key for _, key in held}
    seen: dict[str, str] = {}
    for example in train:
        for key in _identities(example):
            if key in wanted:
                # The first row with a prompt is named in messages.
                seen.setdefault(key, example.source)
    both = [(source, seen[key]) for source, key in held if key in seen]
    if both:
        places = "".join(f"\n  {late} repeats {early}" for late, early in both[:MAX_REPORTED])
        raise DataError(
            f"{len(both)} held-out rows have a prompt that is also in the training data. Set "
            f"the same heldout_frac for both sources, with split: train and split: heldout{places}"
        )


def split_keys(examples: Iterable[Example]) -> set[str]:
    """Return the texts that determine the sides of some examples."""
    return set(map(split_key, examples))


# A synthetic instance can be worded in several ways, so its text alone does not identify it.
def _identities(example: Example) -> list[str]:
    instance = example.columns.get("instance")
    is_world = example.source.startswith("world:")
    keys = [f"text:{split_key(example)}"]
    return [*keys, f"instance:{instance}"] if is_world and instance else keys


def _name(spec: DataSpec) -> str:
    return spec.path or (f"labels {spec.labels}" if spec.labels else f"world {spec.world}")


def with_labels_file(spec: DataSpec, kind: Kind) -> DataSpec:
    """Return the spec with its ``labels`` replaced by the path of the file with such rows.

    Raises:
        DataError: there is no such project, snapshot or file.
    """
    if spec.labels is None:
        return spec
    file = labels_file(spec.labels, "preference" if spec.answers else kind)
    return spec.model_copy(update={"labels": None, "path": str(file)})


def load_one(spec: DataSpec, *, kind: Kind, seed: int, index: int) -> list[Example]:
    """Return the examples of one spec, the number ``index`` of a list, before the mixture.

    Raises:
        DataError: rows are invalid, or none are left.
    """
    spec = with_labels_file(spec, kind)
    if spec.world is not None:
        examples = _load_world(spec, kind=kind, seed=seed)
    else:
        examples = list(read_examples(spec, kind=kind, seed=seed))
        if (places := sample(len(examples), spec, seed=seed, index=index)) is not None:
            examples = [examples[i] for i in places.tolist()]
    if not examples:
        raise none_left(spec, kind)
    return examples


def sample(size: int, spec: DataSpec, *, seed: int, index: int) -> "NDArray[np.int64] | None":
    """Return the places that ``rows`` keeps of a source's examples, in order; None for all."""
    if spec.rows is None or spec.rows >= size:
        return None
    return _chosen(size, spec.rows, seed=seed, purpose=f"rows/{index}")


def none_left(spec: DataSpec, kind: Kind) -> DataError:
    """Return the error for a source without a row."""
    return DataError(
        f"{_name(spec)}: no rows are left for {kind} (split {spec.split}, heldout_frac "
        f"{spec.heldout_frac}). Check the file, or use split: all."
    )


def _load_world(spec: DataSpec, *, kind: Kind, seed: int) -> list[Example]:
    assert spec.world is not None
    if spec.rows is None:
        raise DataError(f"world {spec.world}: how many? give 'rows'")
    if spec.world != kind and kind != "prompts":
        made = kind in ("corpus", "sft", "preference")
        advice = f"use world: {kind}" if made else "set 'path' to a file of such rows"
        raise DataError(f"world {spec.world} cannot serve as {kind} data; {advice}")
    if spec.map or spec.rename or spec.format != "auto":
        raise DataError(
            f"world {spec.world}: 'map', 'rename' and 'format' have no effect; remove them"
        )
    return list(
        generate(
            spec.world,
            rows=spec.rows,
            seed=seed,
            split=cast(Literal["all", "train", "heldout"], spec.split),
            heldout_frac=spec.heldout_frac,
            **({"tasks": spec.tasks} if spec.tasks else {}),
        )
    )


def source_of(spec: DataSpec) -> tuple[str, str]:
    """Return the name under which the source of a spec is read, and the side of its hash split."""
    assert spec.path is not None
    return named_source(spec.path, config=spec.config, revision=spec.revision, split=spec.split)


def read_examples(spec: DataSpec, *, kind: Kind, seed: int) -> Iterator[Example]:
    """Yield the examples of a spec's file in order, without ``rows`` and ``weight``.

    Raises:
        DataError: rows are invalid. All rows are read before, so that it lists up to 20 of them.
    """
    assert spec.path is not None
    wanted: Kind = kind
    if spec.answers is not None:
        if kind != "sft":
            raise DataError(f"{spec.path}: 'answers' has no effect on {kind} data. Remove it.")
        kind = "preference"
    # One detector per source, so that a file of one format is recognized only once.
    detector = FormatDetector(spec.format, kind=kind)
    contents = _Contents()
    errors: list[str] = []
    barren = 0
    name, side = source_of(spec)
    for row, source in map_rows(read_rows(name), spec.map):
        try:
            if isinstance(row, DataError):
                raise row
            row = rename_fields(row, spec.rename, source=source)
            found: list[Example] = []
            for worded in _worded(row, spec, source=source, seed=seed):
                found += _converted(worded, spec, detector, kind=kind, source=source)
        except DataError as error:
            errors.append(str(error))
            if len(errors) > MAX_REPORTED:
                break
            continue
        barren += not found
        for read in found:
            contents.whole.add(read)
            if not _on_side(read, spec, row=row, side=side):
                continue
            for example in _answers(read, spec):
                contents.add(example)
                yield example
    if errors:
        more = "\n... and more" if len(errors) > MAX_REPORTED else ""
        raise DataError("\n".join(errors[:MAX_REPORTED]) + more)
    check_whole(contents.whole, name=spec.path)
    if barren:
        total = detector.counts.total()
        logger.warning("%s: %d of %d rows contain no %s example", spec.path, barren, total, kind)
    forms = ", ".join(f"{n} x {name}" for name, n in detector.counts.items())
    logger.info("%s: %s, %d rows for %s", spec.path, forms, contents.total, wanted)
    contents.log(spec, kind=kind)


def _converted(
    row: Row, spec: DataSpec, detector: FormatDetector, *, kind: Kind, source: str
) -> list[Example]:
    """Return the examples of a row, as turns of the chat template if the spec wants that."""
    form = detector.format_of(row, source)
    made = to_examples(row, kind=kind, format=form, source=source)
    return [as_chat(example) for example in made] if spec.strings == "chat" else made


class _Contents:
    """What the rows of a file hold beside their prompts and responses, counted while it is read."""

    def __init__(self) -> None:
        self.whole = WholeSource()
        self.total = self._plain = self._repeated = self._unanswered = 0
        self._columns: set[str] = set()

    def add(self, example: Example) -> None:
        """Count an example."""
        self.total += 1
        self._plain += isinstance(example.prompt, str) and isinstance(example.completion, str)
        self._columns.update(example.columns)
        prompt, said = text_of(example.prompt).strip(), example.completion
        if len(prompt) >= MIN_REPEATED and said:
            self._repeated += text_of(said).lstrip().startswith(prompt)
        ends = said[-1]["role"] if said and not isinstance(said, str) else "assistant"
        self._unanswered += ends != "assistant"

    def log(self, spec: DataSpec, *, kind: Kind) -> None:
        """Log what was counted."""
        for doubt in self.whole.doubts(kind=kind):
            logger.warning("%s: %s", spec.path, doubt)
        # A mix of plain text and conversations is probably a mistake: only the latter get the
        # template.
        if kind in ("sft", "preference", "unpaired") and 0 < self._plain < self.total:
            logger.warning(
                "%s: %d of %d rows are plain text, the others conversations; the chat template is "
                "applied to these alone. Set strings: chat to render all of them as turns",
                spec.path,
                self._plain,
                self.total,
            )
        # In a few rows this may be meant, as in "say it again".
        if 2 * self._repeated > self.total:
            logger.warning(
                "%s: %d of %d responses begin with their whole prompt, which would be in the row "
                "twice; remove it from the responses (map)",
                spec.path,
                self._repeated,
                self.total,
            )
        if self._unanswered:
            logger.warning(
                "%s: %d of %d conversations go on after their last response; those turns are left "
                "out, since nothing in them is trained",
                spec.path,
                self._unanswered,
                self.total,
            )
        # The label of a row of classes is what is trained.
        if rest := self._columns - ({"label"} if kind == "classes" else set()):
            trained = kind != "prompts"
            use = "columns that are not trained on" if trained else "columns for the rewards"
            logger.info("%s: %s: %s", spec.path, use, ", ".join(sorted(rest)))


def _worded(row: Row, spec: DataSpec, *, source: str, seed: int) -> Sequence[Row]:
    if spec.templates is None:
        return [row]
    from align.data.wordings import word_row

    phrasing = spec.phrasing or "one"
    return word_row(row, source, templates=spec.templates, phrasing=phrasing, seed=seed)


def _answers(example: Example, spec: DataSpec) -> list[Example]:
    """Return sft examples made from a pair if the recipe asks for them (``answers``)."""
    if spec.answers is None:
        return [example]
    sides = [example.completion, example.rejected][: 1 if spec.answers == "chosen" else 2]
    return [replace(example, completion=side, rejected=None, margin=None) for side in sides]


def _on_side(example: Example, spec: DataSpec, *, row: Row, side: str) -> bool:
    if side == "all":
        return True
    # All wordings of a row stay on one side, whatever seed and phrasing.
    key = split_key(example) if spec.templates is None else json.dumps(row, sort_keys=True)
    return side_of(key, heldout_frac=spec.heldout_frac) == side


def _chosen(size: int, count: int, *, seed: int, purpose: str) -> "NDArray[np.int64]":
    """Return a seeded sample of ``count`` places of ``size``."""
    import numpy as np

    # A stream for each purpose: adding a data source must not change the samples of the others.
    digest = hashlib.sha256(f"load/{purpose}/{seed}".encode()).digest()
    order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    # In file order, so that a sample reads like the file.
    return np.sort(order.permutation(size)[:count])


def fingerprints(*groups: Sequence[DataSpec]) -> list[dict[str, Any]]:
    """Return path, sha256 and rows of every file behind the data specs, for the manifest.

    The hashes are of the bytes that were parsed when the rows were loaded.
    """
    found: list[dict[str, Any]] = []
    for spec in (spec for group in groups for spec in group):
        if spec.path is not None:
            found += data_fingerprint(source_of(spec)[0])
        elif spec.labels is not None:
            # Only those that were read: a snapshot has further files.
            read = [file for file in snapshot_files(spec.labels) if num_rows(file) is not None]
            found += [entry for file in read for entry in data_fingerprint(str(file))]
        else:
            # Generated rows have no file: seed and number in the recipe determine them.
            found.append({"path": f"world:{spec.world}", "rows": spec.rows, "sha256": None})
        if spec.templates is not None:
            sha256 = parsed_sha256(file := Path(spec.templates)) or file_sha256(file)
            found.append({"path": spec.templates, "rows": None, "sha256": sha256})
    return found
