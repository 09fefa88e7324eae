"""Recognise the format of a row, import it, and check that it serves the stage."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, cast

from align.core.errors import DataError
from align.core.types import Example, Text
from align.data.formats import importers
from align.data.formats import importers as judged
from align.data.formats.faults import check_example
from align.data.formats.importers import from_classes
from align.data.formats.turns import guess
from align.data.reading.json import Row

logger = logging.getLogger(__name__)

Kind = Literal["sft", "preference", "prompts", "corpus", "unpaired", "steps", "classes"]
Reader = Callable[[Any, str], list[Example]]


@dataclass(frozen=True, slots=True)
class Format:
    """Say which fields a format has and what it gives."""

    fields: tuple[tuple[str, ...], ...]
    gives: tuple[str, ...]
    read: Reader


def _format(*fields: str, gives: str, read: Reader) -> Format:
    """Write alternatives as ``a|b``: each field list that fits is enough."""
    options = tuple(tuple(option.split("+")) for option in fields)
    return Format(options, tuple(gives.split()), read)


FORMATS: dict[str, Format] = {
    "openai_dpo": _format(
        "input+preferred_output+non_preferred_output",
        gives="preference",
        read=importers.from_openai_dpo,
    ),
    "hh": _format("chosen+rejected", gives="preference", read=importers.from_hh),
    "preference": _format("chosen+rejected", gives="preference", read=importers.from_preference),
    "ultrafeedback": _format(
        "instruction+completions", gives="preference", read=importers.from_ultrafeedback
    ),
    "model_solutions": _format(
        "question+ground_truth", gives="preference unpaired", read=importers.from_model_solutions
    ),
    "steps": _format(
        "prompt+steps", "prompt+completions+labels", gives="steps", read=judged.from_steps
    ),
    "oasst": _format(
        "message_tree_id+prompt", gives="sft preference", read=importers.from_oasst_best
    ),
    "sharegpt": _format(
        "conversations", gives="sft preference unpaired", read=importers.from_sharegpt
    ),
    "messages": _format("messages", gives="sft unpaired", read=importers.from_messages),
    "seed_tasks": _format("instruction+instances", gives="sft", read=importers.from_seed_tasks),
    "alpaca": _format(
        "instruction+output", "instruction+response", gives="sft", read=importers.from_alpaca
    ),
    "unpaired": _format("prompt+completion+label", gives="unpaired", read=importers.from_unpaired),
    "prompt_completion": _format(
        "prompt+completion", gives="sft", read=importers.from_prompt_completion
    ),
    "classes": _format(
        "text+label", "messages+label", "prompt+label", gives="classes", read=from_classes
    ),
    "text": _format("text", gives="corpus sft", read=importers.from_text),
    "prompt": _format("prompt", "turns", gives="prompts", read=importers.from_prompt),
}
"""In order of precedence: a format whose fields another one's contain stands after it."""

ALIASES = {"openai": "messages"}
"""Further names that a recipe may give a format."""


class FormatDetector:
    """Find the format of each row; one file has one format.

    Args:
        form: the recipe's ``format``; ``auto`` looks at the fields of the row.
        kind: what the stage needs; decides where a row could be read in two ways.
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
        """Name the format of a row.

        Raises:
            DataError: unknown fields, more than one reading, or another than earlier in the file.
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
    """Find the one format whose fields a row has.

    Raises:
        DataError: none fits (with the row's fields and the nearest known names), or several.
    """
    if isinstance(row, str):
        return "text"
    # Any row may have a label beside its text: it names a class only where classes are asked for.
    fits = [n for n in _fitting(tuple(row)) if (n == "classes") == (kind == "classes")]
    fits = [name for name in fits if not _covered(name, fits, row)]
    if len(fits) > 1:
        wanted = [name for name in fits if kind in FORMATS[name].gives]
        fits = wanted or fits
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise DataError(
            f"{source}: the fields {sorted(row)} can be read as {' or '.join(fits)}; "
            "say which with 'format'",
            code="D042",
        )
    near = _near_misses(row)
    raise DataError(
        f"{source}: no known format has the fields {sorted(row)}{near}; "
        f"expected one of {_expected(kind)}; bring the names in line with 'rename: {{old: new}}'",
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


def _has(fields: Collection[str], form: Format) -> bool:
    return any(all(field in fields for field in option) for option in form.fields)


@lru_cache(maxsize=1024)
def _fitting(fields: tuple[str, ...]) -> list[str]:
    return [name for name, form in FORMATS.items() if _has(fields, form)]


def _covered(name: str, fits: list[str], row: dict[str, Any]) -> bool:
    """Say whether another fitting format reads all fields of this one and more."""
    pair = "chosen" in row and "rejected" in row
    if name == "hh":
        return not (isinstance(row["chosen"], str) and "\n\nAssistant:" in row["chosen"])
    if name == "preference":
        return "sharegpt" in fits or not _covered("hh", fits, row)
    if name == "model_solutions":
        return not any(isinstance(v, dict) and "is_correct" in v for v in row.values())
    if name == "prompt":
        return len(fits) > 1
    if name == "prompt_completion":
        return "unpaired" in fits
    return name == "unpaired" and pair


def to_examples(row: Row, *, kind: Kind, format: str, source: str) -> list[Example]:
    """Bring one row into canonical form and check it.

    Args:
        row: fields of the row, or plain text.
        kind: what the stage needs; ``prompts`` takes the prompt part of any kind of row and keeps
            its completion or chosen answer as column ``reference`` unless the row has that field.
        format: a name of FORMATS, or ``auto``.
        source: ``file:line`` for messages.

    Raises:
        DataError: the row is not of this format, does not serve the kind, or is faulty.
    """
    name = ALIASES.get(format, format)
    if name == "auto":
        name = detect(row, kind=kind, source=source)
    form = FORMATS[name]
    if isinstance(row, str) and name != "text":
        raise DataError(
            f"{source}: plain text, but the format is {format}; use format: text", code="D044"
        )
    if isinstance(row, dict) and not _has(row, form):
        wanted = " or ".join(", ".join(option) for option in form.fields)
        raise DataError(
            f"{source}: format {name} needs {wanted}; the row has {sorted(row)}", code="D040"
        )
    read = form.read
    if (name, kind) == ("oasst", "preference"):
        read = cast(Reader, importers.from_oasst_pairs)
    if (name, kind) == ("model_solutions", "unpaired"):
        read = cast(Reader, judged.from_labelled_solutions)
    examples = [_fit(_with_label_prob(e, kind), kind, name) for e in read(row, source)]
    for example in examples:
        check_example(example, kind=kind)
    return examples


def _with_label_prob(example: Example, kind: Kind) -> Example:
    """Take the column ``label_prob`` of weak labels out of the columns."""
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
    """Take from an example what the kind needs; never turn one kind into another."""
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
        ("preference", "sft"): "set answers: chosen (or both) to make sft rows of the pairs",
        ("unpaired", "sft"): "keep the rows with label true in a file without 'label'",
    }.get((has, kind), f"use a data set of kind {kind}")
    near = _near_misses(example.columns)
    raise DataError(
        f"{example.source}: a row of {name} is {has} data, the stage needs {kind}; {remedy}{near}",
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
    """Keep a row's good answer as column ``reference`` for the rewards; its own field wins."""
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
