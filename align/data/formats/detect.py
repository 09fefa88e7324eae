"""Detect the format of a row, import it, and check that it fits the stage."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, cast

from align.core.errors import DataError
from align.core.types import Example, Text
from align.data.formats import importers
from align.data.formats.faults import check_example
from align.data.formats.importers import from_classes
from align.data.formats.questions import ASKED
from align.data.formats.row_keys import (
    Extras,
    apply_extras,
    check_left_over,
    clean_columns,
    take_extras,
)
from align.data.formats.turns import guess
from align.data.reading.json import Row

logger = logging.getLogger(__name__)

Kind = Literal["sft", "preference", "prompts", "corpus", "unpaired", "steps", "classes"]
Reader = Callable[[Any, str], list[Example]]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to read a row.

    Attributes:
        fields: alternative lists of fields, each sufficient to read a row.
        gives: the kinds of data that it produces.
        read: the importer.
        uses: further fields that the importer reads if they are present.
        when: a further condition on the row; None means none.
        over: formats with the same fields over which this one takes precedence.
        last: use the format only if no other one fits.
    """

    fields: tuple[tuple[str, ...], ...]
    gives: tuple[str, ...]
    read: Reader
    uses: tuple[str, ...] = ()
    when: Callable[[Any], bool] | None = None
    over: tuple[str, ...] = ()
    last: bool = False

    @property
    def used(self) -> frozenset[str]:
        """Return every field that the importer reads."""
        return frozenset(self.uses).union(*self.fields)

    def most_fields(self, row: Collection[str]) -> frozenset[str]:
        """Return the longest list of fields that the row has completely; empty if there is none."""
        whole = [option for option in self.fields if all(field in row for field in option)]
        return frozenset(max(whole, key=len, default=()))


def _format(*fields: str, gives: str, read: Reader, uses: str = "", **options: Any) -> Format:
    """Return a format; each of ``fields`` is one list of fields, joined by ``+``."""
    lists = tuple(tuple(option.split("+")) for option in fields)
    return Format(lists, tuple(gives.split()), read, tuple(uses.split()), **options)


def _is_hh(row: dict[str, Any]) -> bool:
    return isinstance(row["chosen"], str) and "\n\nAssistant:" in row["chosen"]


def _has_attempts(row: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) and "is_correct" in value for value in row.values())


FORMATS: dict[str, Format] = {
    "openai_dpo": _format(
        "input+preferred_output+non_preferred_output",
        gives="preference",
        read=importers.from_openai_dpo,
    ),
    "hh": _format(
        "chosen+rejected",
        gives="preference",
        read=importers.from_hh,
        when=_is_hh,
        over=("preference",),
    ),
    "preference": _format(
        "chosen+rejected",
        *(f"{asked}+chosen+rejected" for asked in ASKED),
        "chosen_messages+rejected_messages",
        gives="preference",
        read=importers.from_preference,
        uses="input history margin score_chosen score_rejected",
        over=("unpaired", "question_answer"),
    ),
    "ultrafeedback": _format(
        "instruction+completions", gives="preference", read=importers.from_ultrafeedback
    ),
    "model_solutions": _format(
        "question+ground_truth",
        gives="preference unpaired",
        read=importers.from_model_solutions,
        when=_has_attempts,
    ),
    "steps": _format(
        "prompt+steps", "prompt+completions+labels", gives="steps", read=importers.from_steps
    ),
    "oasst": _format(
        "message_tree_id+prompt", gives="sft preference", read=importers.from_oasst_best
    ),
    "sharegpt": _format(
        "conversations",
        "conversations+chosen+rejected",
        gives="sft preference unpaired",
        read=importers.from_sharegpt,
        uses="label kto_tag margin",
    ),
    "messages": _format(
        "messages",
        gives="sft unpaired",
        read=importers.from_messages,
        uses="label kto_tag",
        over=("question_answer",),
    ),
    "seed_tasks": _format("instruction+instances", gives="sft", read=importers.from_seed_tasks),
    "alpaca": _format(
        "instruction+output",
        "instruction+input+output",
        "instruction+response",
        gives="sft unpaired",
        read=importers.from_alpaca,
        uses="input history kto_tag",
        over=("question_answer",),
    ),
    "dolly": _format("instruction+context+response", gives="sft", read=importers.from_alpaca),
    "unpaired": _format(
        "prompt+completion+label",
        gives="unpaired",
        read=importers.from_unpaired,
        uses="input",
        over=("question_answer",),
    ),
    "prompt_completion": _format(
        "prompt+completion",
        "prompt+response",
        "input+output",
        gives="sft",
        read=importers.from_prompt_completion,
        uses="input",
        over=("question_answer",),
    ),
    "question_answer": _format(
        "question+answer",
        "question+response",
        "query+response",
        "query+answer",
        "problem+solution",
        gives="sft",
        read=importers.from_question_answer,
        uses="input",
    ),
    "segments": _format("segments", gives="sft", read=importers.from_segments),
    "classes": _format(
        "text+label", "messages+label", "prompt+label", gives="classes", read=from_classes
    ),
    "verl": _format("prompt+reward_model", gives="prompts", read=importers.from_verl),
    "text": _format("text", gives="corpus sft", read=importers.from_text, last=True),
    "prompt": _format(
        "prompt", "turns", gives="prompts", read=importers.from_prompt, uses="input", last=True
    ),
}
"""How rows are read. If several formats fit, one with a strict superset of another's fields takes
precedence. Then ``over`` and ``last`` decide, and finally the kind that the stage needs."""

ALIASES = {"openai": "messages"}
"""Alternative names of formats in a recipe."""


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
            first = self._of_file.setdefault(file, (form, source))
            if first[1] == source:
                logger.info("%s: format %s", file, form)
            elif first[0] != form:
                near = _near_misses(row) if isinstance(row, dict) else ""
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
    # Any row may have a label beside its text. It is a class only if the stage asks for classes.
    fits = [n for n in _fitting(tuple(row)) if (n == "classes") == (kind == "classes")]
    fits = [n for n in fits if (when := FORMATS[n].when) is None or when(row)]
    # Resolve formats with overlapping fields by precedence, then by the kind of the stage.
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
    near = _near_misses(row)
    raise DataError(
        f"{source}: no known format has the fields {sorted(row)}{near}; "
        f"expected one of {_expected(kind)}; rename the fields with 'rename: {{old: new}}'",
        code="D041" if near else "D040",
    )


def _near_misses(row: Mapping[str, Any]) -> str:
    known = {field for form in FORMATS.values() for option in form.fields for field in option}
    strange = [key for key in row if key not in known]
    return "".join(f"{guess(key, known)} (by '{key}')" for key in strange if guess(key, known))


def _expected(kind: Kind) -> str:
    return "; ".join(
        f"{name} ({' or '.join(', '.join(option) for option in form.fields)})"
        for name, form in FORMATS.items()
        if kind in form.gives or kind == "prompts"
    )


@lru_cache(maxsize=1024)
def _fitting(fields: tuple[str, ...]) -> list[str]:
    return [name for name, form in FORMATS.items() if form.most_fields(fields)]


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
    if name == "auto":
        name = detect(row, kind=kind, source=source)
    form = FORMATS[name]
    if isinstance(row, str) and name != "text":
        raise DataError(
            f"{source}: plain text, but the format is {format}; use format: text", code="D044"
        )
    if isinstance(row, dict) and not form.most_fields(row):
        wanted = " or ".join(", ".join(option) for option in form.fields)
        raise DataError(
            f"{source}: format {name} needs {wanted}; the row has {sorted(row)}", code="D040"
        )
    extras = Extras()
    if isinstance(row, dict):
        used = form.used | (set(row) if name == "model_solutions" else set())
        row, extras = take_extras(row, kind=kind, used=used, source=source)
        if extras.weight == 0.0:
            return []
    read = form.read
    if (name, kind) == ("oasst", "preference"):
        read = cast(Reader, importers.from_oasst_pairs)
    if (name, kind) == ("model_solutions", "unpaired"):
        read = cast(Reader, importers.from_labelled_solutions)
    examples = []
    for example in read(row, source):
        if kind in ("sft", "preference", "unpaired"):
            check_left_over(example)
        example = apply_extras(example, extras)
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
    prob = rest.pop("label_prob")
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
    if has == kind or (has, kind) == ("corpus", "sft"):
        return example
    remedy = {
        ("preference", "sft"): "set answers: chosen (or both) to use the pairs as sft rows",
        ("unpaired", "sft"): "keep the rows with label true in a file without 'label'",
    }.get((has, kind), f"use a data set of kind {kind}")
    near = _near_misses(example.columns)
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
    if example.prompt or example.completion is None or isinstance(example.completion, str):
        return example.prompt
    turns = list(example.completion)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns
