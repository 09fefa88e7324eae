"""Load examples for a stage: read, rename, import, split, limit, mix."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np

from align.core.errors import DataError
from align.core.types import Example, PairRow, PromptRow, TokenRow
from align.data.formats.detect import FormatDetector, Kind, to_examples
from align.data.formats.pairs import as_chat
from align.data.labels import labels_file
from align.data.own_map import map_rows
from align.data.reading.json import Row
from align.data.reading.sources import named_source, read_rows
from align.data.split import side_of, split_key
from align.data.toy import generate
from align.data.wordings import word_row
from align.recipe.schema import DataSpec

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

AnyRow = TypeVar("AnyRow", TokenRow, PairRow, PromptRow)
MAX_REPORTED = 20
NUM_PLACES = 5
"""Number of long rows that a message names."""
PROMPT_CUT = "prompt cut"
"""Ledger reason for a pair that is kept after the beginning of its prompt was cut off."""


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
    parts = [_load_one(spec, kind=kind, seed=seed, index=i) for i, spec in enumerate(specs)]
    weights = [spec.weight for spec in specs]
    if mix_cap is not None:
        weights = [float(min(len(part), mix_cap)) for part in parts]
    elif all(weight == 1.0 for weight in weights):
        return [example for part in parts for example in part]
    # The spec with the most rows per unit of weight keeps its rows; the others are repeated.
    scale = max(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    mixed: list[Example] = []
    for i, (part, spec, weight) in enumerate(zip(parts, specs, weights, strict=True)):
        count = round(weight * scale)
        copies, rest = divmod(count, len(part))
        mixed += part * copies + _choose(part, rest, seed=seed, purpose=f"weight/{i}")
        logger.info("%s: weight %g, %d rows become %d", _name(spec), weight, len(part), count)
    return mixed


def check_overlap(train: Iterable[Example], heldout: Iterable[Example]) -> None:
    """Raise if a prompt occurs on both sides of the split.

    Prompts are compared by the text that determines the split (the first user message or the text).
    Rows of synthetic tasks are also compared by their instance, whatever its wording.

    Raises:
        DataError: with the number of overlapping prompts and the first few places.
    """
    seen: dict[str, str] = {}
    for example in train:
        for key in _identities(example):
            # The first row with a prompt is named in messages.
            seen.setdefault(key, example.source)
    both = [
        (example.source, seen[key])
        for example in heldout
        for key in _identities(example)
        if key in seen
    ]
    if both:
        places = "".join(f"\n  {late} repeats {early}" for late, early in both[:MAX_REPORTED])
        raise DataError(
            f"{len(both)} held-out rows have a prompt that is also in the training data. Set "
            f"the same heldout_frac for both sources, with split: train and split: heldout{places}"
        )


def fit_rows(
    rows: Sequence[AnyRow],
    *,
    max_length: int,
    max_lost_frac: float,
    what: str,
    ledger: Path | None = None,
) -> tuple[list[AnyRow], int]:
    """Return the rows that fit into ``max_length``; responses are never cut.

    A sequence that is too long is dropped whole. The prompt of a pair is cut from the left as far
    as needed, equally for both responses, so that both survive. The pair is dropped if its longer
    response leaves no prompt token, or if the prompt must stay whole (``shared`` is False). Prompts
    longer than ``max_length`` are dropped whole.

    Args:
        rows: tokenized rows. max_length: tokens.
        max_lost_frac: largest fraction of rows that may be dropped.
        what: name of the data in messages.
        ledger: JSON Lines file to which every dropped or cut row is appended.

    Returns:
        The rows that are kept and the number of dropped rows.

    Raises:
        DataError: more than ``max_lost_frac`` of the rows, or all of them, are dropped.
    """
    fitted = [(row, fit_row(row, max_length=max_length)) for row in rows]
    kept = [new for _, new in fitted if new is not None]
    lost = [row for row, new in fitted if new is None]
    cut = [row for row, new in fitted if new is not None and new is not row]
    # The ledger lists every affected row, even if the loss is allowed.
    for group, reason in ((lost, "too long"), (cut, PROMPT_CUT)):
        _write_down(group, ledger, reason=reason, max_length=max_length, what=what)
    if cut:
        short = f"{len(cut)} of {len(rows)} pairs were cut to {max_length} tokens"
        logger.warning("%s: the prompts of %s: %s", what, short, _places(cut, ledger))
    if len(lost) > max_lost_frac * len(rows) or not kept:
        longest = max(map(_length, lost), default=0)
        raise DataError(
            f"{what}: {len(lost)} of {len(rows)} rows are longer than max_length {max_length}: "
            f"{_places(lost, ledger)}; the longest has {longest} tokens, and at most "
            f"{max_lost_frac:.1%} may be lost. Raise max_length, remove the long rows, or allow it "
            "with max_lost_frac",
            code="D114",
        )
    if lost:
        dropped = f"lost {len(lost)} of {len(rows)} rows longer than {max_length} tokens"
        logger.warning("%s: %s: %s", what, dropped, _places(lost, ledger))
    return kept, len(lost)


def _places(rows: Sequence[AnyRow], ledger: Path | None) -> str:
    """Return the places of the first rows, and the file that lists all of them."""
    first = ", ".join(f"{row.source} ({_length(row)} tokens)" for row in rows[:NUM_PLACES])
    if len(rows) <= NUM_PLACES:
        return first or "no rows"
    everywhere = ledger or "the output of 'align data check' with --model and --max-length"
    return f"{first} and {len(rows) - NUM_PLACES} more, all in {everywhere}"


def _write_down(
    rows: Sequence[AnyRow], ledger: Path | None, *, reason: str, max_length: int, what: str
) -> None:
    if ledger is None or not rows:
        return
    with ledger.open("a", encoding="utf-8") as out:
        for row in rows:
            entry = {"source": row.source, "reason": reason, "tokens": _length(row)}
            entry |= {"max_length": max_length, "of": what}
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _length(row: TokenRow | PairRow | PromptRow) -> int:
    if isinstance(row, PairRow):
        return max(len(row.chosen.input_ids), len(row.rejected.input_ids))
    return len(row.input_ids)


def fit_row(row: AnyRow, *, max_length: int) -> AnyRow | None:
    """Return a row unchanged or, for a pair, with its prompt cut; None if it cannot fit."""
    if _length(row) <= max_length:
        return row
    return cast(AnyRow | None, _cut_pair(row, max_length)) if isinstance(row, PairRow) else None


def _cut_pair(pair: PairRow, max_length: int) -> PairRow | None:
    # Both sides lose the same tokens, so the prompt stays shared.
    over = _length(pair) - max_length
    if over <= 0:
        return pair
    head = pair.num_head_tokens
    if over >= pair.num_prompt_tokens - head or not pair.shared:
        return None
    return replace(
        pair,
        chosen=_cut(pair.chosen, head, over),
        rejected=_cut(pair.rejected, head, over),
        num_prompt_tokens=pair.num_prompt_tokens - over,
    )


def _cut(row: TokenRow, head: int, count: int) -> TokenRow:
    """Return a row without ``count`` tokens after its first ``head`` ones."""
    ids, trained = (x[:head] + x[head + count :] for x in (row.input_ids, row.trained))
    return replace(row, input_ids=ids, trained=trained)


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


def _load_one(spec: DataSpec, *, kind: Kind, seed: int, index: int) -> list[Example]:
    spec = with_labels_file(spec, kind)
    if spec.world is not None:
        examples = _load_world(spec, kind=kind, seed=seed)
    else:
        examples = _load_path(spec, kind=kind, seed=seed)
        if spec.rows is not None and spec.rows < len(examples):
            examples = _choose(examples, spec.rows, seed=seed, purpose=f"rows/{index}")
    if not examples:
        raise DataError(
            f"{_name(spec)}: no rows are left for {kind} (split {spec.split}, heldout_frac "
            f"{spec.heldout_frac}). Check the file, or use split: all."
        )
    return examples


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


def _load_path(spec: DataSpec, *, kind: Kind, seed: int) -> list[Example]:
    assert spec.path is not None
    wanted: Kind = kind
    if spec.answers is not None:
        if kind != "sft":
            raise DataError(f"{spec.path}: 'answers' has no effect on {kind} data. Remove it.")
        kind = "preference"
    # One detector per source, so that a file of one format is recognized only once.
    detector = FormatDetector(spec.format, kind=kind)
    examples: list[Example] = []
    errors: list[str] = []
    barren = 0
    name, side = source_of(spec)
    for row, source in map_rows(read_rows(name), spec.map):
        try:
            if isinstance(row, DataError):
                raise row
            found: list[Example] = []
            row = rename_fields(row, spec.rename, source=source)
            for worded in _worded(row, spec, source=source, seed=seed):
                form = detector.format_of(worded, source)
                made = to_examples(worded, kind=kind, format=form, source=source)
                found += [as_chat(e) for e in made] if spec.strings == "chat" else made
        except DataError as error:
            errors.append(str(error))
            if len(errors) > MAX_REPORTED:
                break
            continue
        barren += not found
        examples += [
            a for e in found if _on_side(e, spec, row=row, side=side) for a in _answers(e, spec)
        ]
    # All rows are read before an error is raised, so that it lists up to MAX_REPORTED rows.
    if errors:
        more = "\n... and more" if len(errors) > MAX_REPORTED else ""
        raise DataError("\n".join(errors[:MAX_REPORTED]) + more)
    if barren:
        total = detector.counts.total()
        logger.warning("%s: %d of %d rows contain no %s example", spec.path, barren, total, kind)
    forms = ", ".join(f"{n} x {name}" for name, n in detector.counts.items())
    logger.info("%s: %s, %d rows for %s", spec.path, forms, len(examples), wanted)
    _log_contents(spec, examples, kind=kind)
    return examples


def _log_contents(spec: DataSpec, examples: Sequence[Example], *, kind: Kind) -> None:
    """Log what the rows of a file hold beside their prompts and responses."""
    # A mix of plain text and conversations is probably a mistake: only the latter get the template.
    plain = sum(isinstance(e.prompt, str) and isinstance(e.completion, str) for e in examples)
    if kind in ("sft", "preference", "unpaired") and 0 < plain < len(examples):
        logger.warning(
            "%s: %d of %d rows are plain text, the others conversations; the chat template is "
            "applied to these alone. Set strings: chat to render all of them as turns",
            spec.path,
            plain,
            len(examples),
        )
    beside = sorted({name for example in examples for name in example.columns})
    if beside:
        use = "columns for the rewards" if kind == "prompts" else "columns that are not trained on"
        logger.info("%s: %s: %s", spec.path, use, ", ".join(beside))


def _worded(row: Row, spec: DataSpec, *, source: str, seed: int) -> Sequence[Row]:
    if spec.templates is None:
        return [row]
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


def _choose(examples: list[Example], count: int, *, seed: int, purpose: str) -> list[Example]:
    # A stream for each purpose: adding a data source must not change the samples of the others.
    digest = hashlib.sha256(f"load/{purpose}/{seed}".encode()).digest()
    order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    chosen = order.permutation(len(examples))[:count]
    # Back in file order, so that a sample reads like the file.
    return [examples[i] for i in sorted(chosen.tolist())]
