"""Detect the format of a row, import it, and check that it fits the stage."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text
from align.data.formats.faults import check_example
from align.data.formats.hints import layout_advice, near_misses, renamed
from align.data.formats.left_over import check_left_over
from align.data.formats.questions import prompt_of
from align.data.formats.row_keys import (
    Extras,
    apply_extras,
    clean_columns,
    take_extras,
    without_index,
)
from align.data.formats.tools import parsed
from align.data.formats.turns import is_nothing, is_role, parse_turns, shown
from align.data.reading.json import Row
from align.recipe.schema.formats import ALIASES, FORMATS, Kind

logger = logging.getLogger(__name__)

Importer = Callable[[Any, str], list[Example]]


@cache
def _importer(place: str) -> Importer:
    """Return the function that ``module:function`` names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


class FormatDetector:
    """Detect the format of each row; all rows of a file have the same format.

    Args:
        form: the recipe's ``format``; ``auto`` detects it from the fields of the row.
        kind: what the stage needs; it resolves rows that could be read in two ways.
    """

    def __init__(self, form: str, *, kind: Kind) -> None:
        self._form = ALIASES.get(form, form)
        self._kind: Kind = kind
        self._of_file: dict[str, tuple[str, str]] = {}
        self.counts: Counter[str] = Counter()

    def expect(self, file: str, form: str) -> None:
        """Set the format of a file before its first row."""
        self._of_file[file] = (form, file)

    def format_of(self, row: Row, source: str) -> str:
        """Return the name of the format of a row.

        Raises:
            DataError: unknown fields, several fitting formats, or not the format of earlier rows.
        """
        form = self._form
        if form == "auto":
            form = detect(row, kind=self._kind, source=source)
            file = source.rpartition(":")[0]
            # The first row decides; a later row of another format is probably a mistake in the
            # data.
            first = self._of_file.setdefault(file, (form, source))
            if first[1] == source:
                logger.info("%s: format %s", file, form)
            elif first[0] != form:
                near = near_misses(row) if isinstance(row, dict) else ""
                raise DataError(
                    f"{source}: format {form}, but {first[1]} is {first[0]}; split the file or "
                    f"set 'format'{near}",
                    code="D041" if near else "D043",
                )
        self.counts[form] += 1
        return form


def detect(row: Row, *, kind: Kind, source: str) -> str:
    """Return the one format whose fields a row has.

    Raises:
        DataError: no format fits (the message lists the nearest known names), or several do.
    """
    if isinstance(row, str):
        return "text"
    _refuse_single_turn(row, source)
    # Any row may have a label beside its text. It is a class only if the stage asks for classes.
    fits = [n for n in _fitting(tuple(row)) if (n == "classes") == (kind == "classes")]
    fits = [n for n in fits if (when := FORMATS[n].when) is None or when(row)]
    # Resolve formats with overlapping fields by precedence, then by the kind of the stage.
    if len(fits) > 1:
        fits = [name for name in fits if not any(_takes(other, name, row) for other in fits)]
    if len(fits) > 1:
        wanted = [name for name in fits if kind in FORMATS[name].gives]
        fits = wanted or fits
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise DataError(
            f"{source}: the fields {sorted(row)} can be read as {' or '.join(fits)}; "
            "select one with 'format'",
            code="D042",
        )
    near = near_misses(row)
    if "input_ids" in row:
        raise DataError(
            f"{source}: the row has token ids (input_ids) and no text. Stages tokenize texts "
            "themselves, so that template and mask fit the model; use the rows from which the ids "
            "were made",
            code="D040",
        )
    hint = _rename_hint(row, kind, source) or layout_advice(row)
    raise DataError(
        f"{source}: no known format has the fields {sorted(row)}{hint or near}; expected one of "
        f"{_expected(kind)}; rename the fields (rename: {{old: new}}) or convert the rows "
        "(map: FILE.py:NAME)",
        code="D041" if near else "D040",
    )


def _refuse_single_turn(row: Mapping[str, Any], source: str) -> None:
    """Raise if a row is one turn of a conversation: read as text, it would be trained alone."""
    said = next((row[key] for key in ("role", "from") if key in row), None)
    texts = [key for key in ("content", "text", "value") if isinstance(row.get(key), str)]
    if is_role(said) and texts:
        raise DataError(
            f"{source}: the row is one turn ({shown(said)}), but the turns of a conversation "
            "belong into one row: {messages: [{role, content}, ...]}. Group them, for example by "
            "the id of their conversation or of the turn before (map: FILE.py:NAME)",
            code="D050",
        )


def _rename_hint(row: Mapping[str, Any], kind: Kind, source: str) -> str:
    """Return the ``rename`` with which the row can be read; "" if there is none."""
    for answer in ("completion", "response", "output"):
        names = renamed(row, answer=answer)
        given = {names.get(key, key): value for key, value in row.items()}
        for old, new in names.items():
            outer, _, inner = old.partition(".")
            if old not in row and inner:
                given[new] = row[outer][inner]
        with suppress(DataError):
            if names:
                to_examples(given, kind=kind, format="auto", source=source)
                told = ", ".join(f"{old}: {new}" for old, new in names.items())
                return f"; it can be read with rename: {{{told}}}"
    return ""


def _expected(kind: Kind) -> str:
    return "; ".join(
        f"{name} ({' or '.join(', '.join(option) for option in form.fields)})"
        for name, form in FORMATS.items()
        if kind in form.gives or kind == "prompts"
    )


@lru_cache(maxsize=1024)
def _fitting(fields: tuple[str, ...]) -> list[str]:
    return [name for name, form in FORMATS.items() if form.most_fields(fields)]


@cache
def _used(name: str) -> frozenset[str]:
    return FORMATS[name].used


def _takes(name: str, other: str, row: Collection[str]) -> bool:
    """Return whether one fitting format takes precedence over another one."""
    one, two = FORMATS[name], FORMATS[other]
    if one.last != two.last:
        return two.last
    return other in one.over or one.most_fields(row) > two.most_fields(row)


def to_examples(row: Row, *, kind: Kind, format: str, source: str) -> list[Example]:
    """Convert one row to examples and check them.

    Args:
        row: fields of the row, or plain text.
        kind: what the stage needs. ``prompts`` takes the prompt of any kind of row and keeps its
            completion or chosen response as column ``reference`` unless the row has that field.
        format: a name of FORMATS, or ``auto``.
        source: ``file:line`` for messages.

    Raises:
        DataError: the row is not of this format, does not fit the kind, or is invalid.
    """
    name = ALIASES.get(format, format)
    if isinstance(row, dict):
        row = parse_turns(without_index(row, source=source), source=source)
    if name == "auto":
        name = detect(row, kind=kind, source=source)
    form = FORMATS[name]
    if isinstance(row, str) and name != "text":
        raise DataError(
            f"{source}: plain text, but the format is {format}; use format: text", code="D044"
        )
    if isinstance(row, dict) and name not in _fitting(tuple(row)):
        wanted = " or ".join(", ".join(option) for option in form.fields)
        raise DataError(
            f"{source}: format {name} needs {wanted}; the row has {sorted(row)}", code="D040"
        )
    # Settings that every format shares are taken out before the importer sees the row.
    extras = Extras()
    if isinstance(row, dict):
        used = set(row) if name == "model_solutions" else _used(name)
        row, extras = take_extras(row, kind=kind, used=used, source=source)
        if extras.weight == 0.0:
            return []
    read = _importer(form.read_for.get(kind, form.read))
    examples = []
    for example in read(row, source):
        example = apply_extras(example, extras)
        if example.columns and isinstance(row, dict):
            check_left_over(example, kind=kind, form=name, row=row)
        if kind == "prompts" and example.label is not None and isinstance(row, dict):
            # A rating of the row's own answer is a column like any other.
            given = {key: row[key] for key in ("label", "kto_tag") if key in row}
            example = replace(example, columns={**given, **example.columns})
        if example.columns:
            example = replace(example, columns=clean_columns(example.columns))
        examples.append(_fit(_with_label_prob(example, kind), kind, name))
        check_example(examples[-1], kind=kind)
    return examples


def _with_label_prob(example: Example, kind: Kind) -> Example:
    """Move ``label_prob`` of weak labels from the columns to its own field."""
    if "label_prob" not in example.columns:
        return example
    if kind in ("unpaired", "steps"):
        raise DataError(
            f"{example.source}: label_prob has no effect on {kind} rows, whose labels count as "
            "certain; use them in sft, reward or dpo, or set it aside (rename: {label_prob: was})"
        )
    rest = dict(example.columns)
    prob = parsed(rest.pop("label_prob"))  # cells of a table are text, and empty ones are nothing
    if is_nothing(prob):
        return replace(example, columns=rest)
    if isinstance(prob, bool) or not isinstance(prob, int | float) or not 0.0 <= prob <= 1.0:
        raise DataError(
            f"{example.source}: label_prob: expected a number in [0, 1], found {prob!r}"
        )
    return replace(example, label_prob=float(prob), columns=rest)


def _fit(example: Example, kind: Kind, name: str) -> Example:
    """Return the part of an example that the kind needs; kinds are never converted silently."""
    if kind == "prompts":
        return replace(
            example,
            prompt=_prompt_part(example, name),
            completion=None,
            rejected=None,
            label=None,
            columns=_with_reference(example),
        )
    has = _kind_of(example, name)
    # Plain text trains all of its tokens, which sft can; every other change would lose something.
    if has == kind or (has, kind) == ("corpus", "sft"):
        return example
    remedy = {
        ("preference", "sft"): "set answers: chosen (or both) to use the pairs as sft rows",
        ("unpaired", "sft"): "keep the rows with label true in a file without 'label'",
    }.get((has, kind), f"use a data set of kind {kind}")
    near = layout_advice(example.columns) or near_misses(example.columns)
    raise DataError(
        f"{example.source}: a {name} row is {has} data, but the stage needs {kind}; {remedy}{near}",
        code="D041" if near else "D044",
    )


def _kind_of(example: Example, name: str) -> str:
    if name in ("steps", "classes"):
        return name
    if example.rejected is not None:
        return "preference"
    if example.label is not None:
        return "unpaired"
    if example.completion is None:
        return "prompts"
    return "corpus" if name == "text" else "sft"


def _with_reference(example: Example) -> Mapping[str, Any]:
    """Keep a row's good response as column ``reference`` for rewards, unless the row has one."""
    answer = None if example.label is False else example.completion
    if answer is not None and not isinstance(answer, str):
        answer = answer[-1]["content"] if answer and answer[-1]["role"] == "assistant" else None
    return {"reference": answer, **example.columns} if answer else example.columns


def _prompt_part(example: Example, name: str) -> Text:
    if name == "text":
        raise DataError(
            f"{example.source}: plain text has no prompts; use rows with a field 'prompt'",
            code="D044",
        )
    return prompt_of(example)
