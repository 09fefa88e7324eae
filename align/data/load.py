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
from align.data.reading.json import Row
from align.data.reading.sources import named_source, read_rows
from align.data.split import side_of, split_key
from align.data.toy import generate
from align.data.wordings import word_row
from align.recipe.schema import DataSpec

_MISSING = object()


def _nested(row: Mapping[str, Any], path: str) -> Any:
    """Return what stands at ``outer.inner`` of a row, whose outer field stays as it is."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
    return value


def rename_fields(row: Row, rename: Mapping[str, str], *, source: str) -> Row:
    """Return the row with its fields renamed ``{old: new}``; ``outer.inner`` names a nested one.

    Raises:
        DataError: a field is missing, or two would have one name.
    """
    if not rename:
        return row
    if isinstance(row, str):
        raise DataError(f"{source}: 'rename' has no effect on plain text; remove it", code="D044")
    nested = {old: _nested(row, old) for old in rename if old not in row and "." in old}
    row = {**row, **{old: value for old, value in nested.items() if value is not _MISSING}}
    missing = sorted(set(rename) - set(row))
    if missing:
        message = f"{source}: rename: no field {missing}; the row has {sorted(row)}"
        raise DataError(message, code="D040")
    names = Counter(rename.get(key, key) for key in row)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        message = f"{source}: rename: {twice} would stand twice in {sorted(row)}"
        raise DataError(message, code="D042")
    return {rename.get(key, key): value for key, value in row.items()}


logger = logging.getLogger(__name__)

AnyRow = TypeVar("AnyRow", TokenRow, PairRow, PromptRow)
MAX_REPORTED = 20
NUM_PLACES = 5
"""Long rows that a message names."""
PROMPT_CUT = "prompt cut"
"""Reason in the ledger of a pair that stays, with the beginning of its prompt cut off."""


def load_examples(
    specs: Sequence[DataSpec], *, kind: Kind, seed: int, mix_cap: int | None = None
) -> list[Example]:
    """Load the rows of all specs in one deterministic list.

    Each spec in turn is read, its fields renamed (``rename: {old: new}``), its rows brought into
    canonical form and split by the hash of the first user message; ``rows`` then keeps a seeded
    choice of that many, in file order. ``answers`` makes sft rows of preference pairs. ``weight``
    sets the mixture: with n_i rows and weight w_i, a spec of the largest n_i / w_i = S keeps each
    row once, and every other spec is brought to round(w_i * S) rows: whole copies in order, then a
    seeded choice of the rest. So nothing is ever thrown away by a weight, equal weights make the
    sets equally large, and without any weight set (all 1.0) the sets are joined as they are. The
    result is not shuffled.

    Args:
        specs: data sources of the recipe.
        kind: what the stage needs of each row. ``prompts`` takes the prompt of any kind of row.
        seed: decides ``rows``, weights, wordings and generated data.
        mix_cap: weights are min(n_i, mix_cap): sets count by their size, up to a limit.

    Raises:
        DataError: rows that cannot be used (up to 20 are listed), or nothing is left.
    """
    parts = [_load_one(spec, kind=kind, seed=seed, index=i) for i, spec in enumerate(specs)]
    weights = [spec.weight for spec in specs]
    if mix_cap is not None:
        weights = [float(min(len(part), mix_cap)) for part in parts]
    elif all(weight == 1.0 for weight in weights):
        return [example for part in parts for example in part]
    scale = max(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    mixed: list[Example] = []
    for i, (part, spec, weight) in enumerate(zip(parts, specs, weights, strict=True)):
        count = round(weight * scale)
        copies, rest = divmod(count, len(part))
        mixed += part * copies + _choose(part, rest, seed=seed, purpose=f"weight/{i}")
        logger.info("%s: weight %g, %d rows become %d", _name(spec), weight, len(part), count)
    return mixed


def check_overlap(train: Iterable[Example], heldout: Iterable[Example]) -> None:
    """Refuse data in which a prompt stands on both sides.

    Prompts are compared by what decides the split (the first user message or the text), and
    generated rows also by their instance, whatever its wording.

    Raises:
        DataError: with how many prompts overlap and the first few places.
    """
    seen: dict[str, str] = {}
    for example in train:
        for key in _identities(example):
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
            f"{len(both)} held-out rows have a prompt that is also trained on; give both sources "
            f"the same heldout_frac and split: train / split: heldout{places}"
        )


def fit_rows(
    rows: Sequence[AnyRow],
    *,
    max_length: int,
    max_lost_frac: float,
    what: str,
    ledger: Path | None = None,
) -> tuple[list[AnyRow], int]:
    """Keep the rows that fit; never cut an answer.

    A sequence that is longer is lost whole. The prompt of a pair is cut from the left as far as
    needed, the same for both answers, so that both survive; the pair is lost when its longer
    answer leaves no prompt token, or the prompt must stay whole (``shared`` False). Prompts longer
    than ``max_length`` are lost whole.

    Args:
        rows: tokenised rows.
        max_length: tokens.
        max_lost_frac: largest share that may be lost.
        what: name of the data in messages.
        ledger: JSON Lines file to which every row that is lost or cut is added.

    Returns:
        The rows kept and how many were lost.

    Raises:
        DataError: more than ``max_lost_frac`` of the rows are lost, or all.
    """
    kept: list[AnyRow] = []
    lost: list[AnyRow] = []
    cut: list[AnyRow] = []
    for row in rows:
        fitted = fit_row(row, max_length=max_length)
        if fitted is None:
            lost.append(row)
            continue
        kept.append(fitted)
        if fitted is not row:
            cut.append(row)
    for group, reason in ((lost, "too long"), (cut, PROMPT_CUT)):
        _write_down(group, ledger, reason=reason, max_length=max_length, what=what)
    if cut:
        logger.warning(
            "%s: the prompts of %d of %d pairs were cut to %d tokens: %s",
            what,
            len(cut),
            len(rows),
            max_length,
            _places(cut, ledger),
        )
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
        logger.warning(
            "%s: lost %d of %d rows longer than %d tokens: %s",
            what,
            len(lost),
            len(rows),
            max_length,
            _places(lost, ledger),
        )
    return kept, len(lost)


def _places(rows: Sequence[AnyRow], ledger: Path | None) -> str:
    """Name the first rows, and say where all of them stand."""
    first = ", ".join(f"{row.source} ({_length(row)} tokens)" for row in rows[:NUM_PLACES])
    if len(rows) <= NUM_PLACES:
        return first or "no rows"
    everywhere = ledger or "what 'align data check' says with --model and --max-length"
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
    """Give a row as it is or with its pair's prompt cut, or None where it is lost."""
    if _length(row) <= max_length:
        return row
    return cast(AnyRow | None, _cut_pair(row, max_length)) if isinstance(row, PairRow) else None


def _cut_pair(pair: PairRow, max_length: int) -> PairRow | None:
    over = _length(pair) - max_length
    if over <= 0:
        return pair
    if over >= pair.num_prompt_tokens or not pair.shared:
        return None
    return replace(
        pair,
        chosen=_cut(pair.chosen, over),
        rejected=_cut(pair.rejected, over),
        num_prompt_tokens=pair.num_prompt_tokens - over,
    )


def _cut(row: TokenRow, count: int) -> TokenRow:
    return replace(row, input_ids=row.input_ids[count:], trained=row.trained[count:])


def _identities(example: Example) -> list[str]:
    instance = example.columns.get("instance")
    is_world = example.source.startswith("world:")
    keys = [f"text:{split_key(example)}"]
    return [*keys, f"instance:{instance}"] if is_world and instance else keys


def _name(spec: DataSpec) -> str:
    return spec.path or f"world {spec.world}"


def _load_one(spec: DataSpec, *, kind: Kind, seed: int, index: int) -> list[Example]:
    if spec.world is not None:
        examples = _load_world(spec, kind=kind, seed=seed)
    else:
        examples = _load_path(spec, kind=kind, seed=seed)
        if spec.rows is not None and spec.rows < len(examples):
            examples = _choose(examples, spec.rows, seed=seed, purpose=f"rows/{index}")
    if not examples:
        raise DataError(
            f"{_name(spec)}: no rows are left for {kind} (split {spec.split}, heldout_frac "
            f"{spec.heldout_frac}); check the file, or take split: all"
        )
    return examples


def _load_world(spec: DataSpec, *, kind: Kind, seed: int) -> list[Example]:
    assert spec.world is not None
    if spec.rows is None:
        raise DataError(f"world {spec.world}: how many? give 'rows'")
    if spec.world != kind and kind != "prompts":
        made = kind in ("corpus", "sft", "preference")
        advice = f"use world: {kind}" if made else "give a file of such rows by 'path'"
        raise DataError(f"world {spec.world} cannot serve as {kind} data; {advice}")
    if spec.rename or spec.format != "auto":
        raise DataError(f"world {spec.world}: 'rename' and 'format' have no effect; remove them")
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
    """Return the name by which the source of a spec is read, and which side of it by hash."""
    assert spec.path is not None
    return named_source(spec.path, config=spec.config, revision=spec.revision, split=spec.split)


def _load_path(spec: DataSpec, *, kind: Kind, seed: int) -> list[Example]:
    assert spec.path is not None
    wanted: Kind = kind
    if spec.answers is not None:
        if kind != "sft":
            raise DataError(f"{spec.path}: 'answers' has no effect on {kind} data; remove it")
        kind = "preference"
    detector = FormatDetector(spec.format, kind=kind)
    examples: list[Example] = []
    errors: list[str] = []
    barren = 0
    name, side = source_of(spec)
    for row, source in read_rows(name):
        try:
            found: list[Example] = []
            row = rename_fields(row, spec.rename, source=source)
            for worded in _worded(row, spec, source, seed):
                form = detector.format_of(worded, source)
                made = to_examples(worded, kind=kind, format=form, source=source)
                found += [as_chat(e) for e in made] if spec.strings == "chat" else made
        except DataError as error:
            errors.append(str(error))
            if len(errors) > MAX_REPORTED:
                break
            continue
        barren += not found
        examples += [a for e in found if _on_side(e, spec, row, side) for a in _answers(e, spec)]
    if errors:
        more = "\n... and more" if len(errors) > MAX_REPORTED else ""
        raise DataError("\n".join(errors[:MAX_REPORTED]) + more)
    if barren:
        total = detector.counts.total()
        logger.warning("%s: %d of %d rows hold no %s example", spec.path, barren, total, kind)
    forms = ", ".join(f"{n} x {name}" for name, n in detector.counts.items())
    logger.info("%s: %s, %d rows for %s", spec.path, forms, len(examples), wanted)
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
    return examples


def _worded(row: Row, spec: DataSpec, source: str, seed: int) -> Sequence[Row]:
    if spec.templates is None:
        return [row]
    phrasing = spec.phrasing or "one"
    return word_row(row, source, templates=spec.templates, phrasing=phrasing, seed=seed)


def _answers(example: Example, spec: DataSpec) -> list[Example]:
    """Make sft examples of a pair where the recipe asks for it (``answers``)."""
    if spec.answers is None:
        return [example]
    sides = [example.completion, example.rejected][: 1 if spec.answers == "chosen" else 2]
    return [replace(example, completion=side, rejected=None, margin=None) for side in sides]


def _on_side(example: Example, spec: DataSpec, row: Row, side: str) -> bool:
    if side == "all":
        return True
    # All wordings of a row stay on one side, whatever seed and phrasing.
    key = split_key(example) if spec.templates is None else json.dumps(row, sort_keys=True)
    return side_of(key, heldout_frac=spec.heldout_frac) == side


def _choose(examples: list[Example], count: int, *, seed: int, purpose: str) -> list[Example]:
    digest = hashlib.sha256(f"load/{purpose}/{seed}".encode()).digest()
    order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    chosen = order.permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen.tolist())]
