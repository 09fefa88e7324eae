"""Refuse a column with text of the question or the answer that the example does not contain.

Every further key of a row is a column, which only rewards see. A passage, the choices of a question
or a second answer that ends there is lost for the model.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text
from align.data.formats.fields import fields_inside, outer_of
from align.data.formats.questions import prompt_of
from align.data.formats.turns import plain_name, shown
from align.recipe.schema.formats import ASKED, FORMATS, Kind

QUESTION_TEXTS = ("input", "context", "documents", "choices", "options")
"""Text of the question that only some formats can represent."""
SYSTEM = ("system", "system_prompt", "system_message")
_SAID = (*ASKED, "completion", "response", "output")
"""Columns that may hold another question or answer than the one that is trained."""
_READ = ("document", "article", "passage", "passages", "paragraph", "background", "preamble")
_READ += ("sys", "sys_prompt", "system_instruction", "instruction_system", "persona", "user_input")
_READ += ("support", "premise", "hypothesis", "ctx", "endings", "starter_code", "table")
_READ += ("suffix",)  # of rows that fill in the middle
_READ += ("few_shot", "few_shots", "fewshot", "shots", "examples", "demonstrations", "exemplars")
"""Columns that often hold a part of the question; no stage would read it there."""
_READ_WORDS = frozenset(("context", "contexts", "passage", "passages", "document", "documents"))
_READ_WORDS |= {"paragraphs", "choices", "options"}
"""Last words of the names of such columns, such as wiki_context."""
_UNSEEN = frozenset(("privileged", "teacher", "reference", "gold", "judge", "grader", "hidden"))
"""First words of names of columns that the model is not to see, such as privileged_context, which
TRL's self-distillation shows the teacher alone."""
_CHOICE = re.compile(r"[a-h]|(choice|option|opt?|ending|distractor|sol)_?([a-h]|\d)")
"""Names of columns with one choice each, such as those of MMLU's tables (A, B, C, D)."""
_CHOICES = ("choices", "options", "endings")
_BESIDE_TEXT = ("summary", "summaries", "highlights", "target", "targets", "translation", "reply")
_BESIDE_TEXT += ("answer", "answers", "solution", "code")
"""Columns of plain text that often hold what the text is to be answered with."""


def check_left_over(
    example: Example, *, kind: Kind, form: str = "", row: Mapping[str, Any] | None = None
) -> None:
    """Refuse a part of the question or an answer in a column whose text the example does not have.

    Rows may repeat their question beside the conversation, as those of UltraChat do.

    Args:
        example: the example, with its columns.
        kind: what the stage needs; the model sees nothing of ``prompts`` but the prompt.
        form: name of the row's format.
        row: the row; it and ``form`` decide the remedy.

    Raises:
        DataError: names the columns.
    """
    names = {key: part for key in example.columns if (part := _part(key, example, kind))}
    inner = {
        key: value
        for key, value in fields_inside(example.columns)
        if key.rpartition(".")[2] in SYSTEM and isinstance(value, str)
    }
    names |= dict.fromkeys(inner, "system")
    columns = {**example.columns, **inner}
    if not names:
        return
    sides = (example.prompt, example.completion, example.rejected)
    seen: Sequence[Text | None] = (prompt_of(example),) if kind == "prompts" else sides
    there = "\n".join(" ".join(text.split()) for side in seen for text in _texts(side))
    lost = {
        key: text
        for key, part in names.items()
        if not (part == "whole" and _contains_responses(columns[key], example))
        and (text := _missing(columns[key], there, alone=part == "choice")) is not None
    }
    if not lost:
        return
    them = "it" if len(lost) == 1 else "them"
    outer = dict.fromkeys(outer_of(key) if key in inner else key for key in lost)
    aside = ", ".join(f"{key}: {key}_column" for key in outer)
    use = _remedy(lost, names, them=them, form=form, row=row or {})
    raise DataError(
        f"{example.source}: {', '.join(lost)}: {shown(next(iter(lost.values())))} would be "
        f"dropped, since the row's text is taken from other fields; {use}remove {them}, or keep "
        f"{them} as columns by another name (rename: {{{aside}}})",
        code="D045",
    )


def _part(key: str, example: Example, kind: Kind) -> str:
    """Return what a column may hold, "" for nothing of the row's text.

    A part of the ``question``, a ``choice``, an ``answer``, the ``whole`` row as one text, or
    ``other`` text.
    """
    name = plain_name(key)
    if name in _CHOICES or _CHOICE.fullmatch(name):
        return "choice"
    words = name.split("_")
    if name in (*QUESTION_TEXTS, *_READ) or (words[-1] in _READ_WORDS and words[0] not in _UNSEEN):
        return "question"
    if kind not in ("sft", "preference", "unpaired"):
        return ""
    # A paragraph of plain text has no prompt; a name beside it is its class or its answer.
    if example.prompt == "" and (name in _BESIDE_TEXT or (name == "label" and kind == "sft")):
        return "answer"
    if name == "text":
        return "whole"
    return "other" if name in _SAID else ""


def _remedy(
    lost: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    them: str,
    form: str,
    row: Mapping[str, Any],
) -> str:
    """Return the way to train the text, followed by a comma; "" if there is no common one."""
    first = next(iter(lost))
    if names[first] == "answer":
        return f"train it as the answer (rename: {{text: prompt, {first}: completion}}), "
    if names[first] == "system" and "[" not in first:
        return f"render it as the system turn (rename: {{{first}: system}}), "
    if names[first] in ("other", "whole"):
        return ""
    asked = next((row[name] for name in ASKED if name in row), None)
    joins = form in FORMATS and "input" in FORMATS[form].uses and "input" not in row
    if len(lost) == 1 and joins and isinstance(asked, str) and isinstance(row.get(first), str):
        return f"write it below the question (rename: {{{first}: input}}), "
    return f"write {them} into the question (templates, or map: FILE.py:NAME), "


def _contains_responses(value: object, example: Example) -> bool:
    """Return whether a text has all responses of the row, as one that a template has rendered."""
    whole = " ".join(value.split()) if isinstance(value, str) else ""
    sides = [side for side in (example.completion, example.rejected) if side]
    said = [
        [side]
        if isinstance(side, str)
        else [t["content"] for t in side if t["role"] == "assistant"]
        for side in sides
    ]
    return any(all(" ".join(text.split()) in whole for text in side) for side in said)


def _missing(value: object, there: str, *, alone: bool) -> str | None:
    """Return the first text of a value that does not occur; with ``alone``, as whole words."""
    for text in _texts(value, numbers=alone):
        part = " ".join(text.split())
        if alone:
            found = re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9])", there)
        else:  # a count, such as num_documents, says nothing
            found = part in there or part.isdecimal()
        if not found:
            return text
    return None


def _texts(side: object, *, numbers: bool = False) -> Iterator[str]:
    """Yield the texts in a column, or in the content of turns, at any depth."""
    if isinstance(side, str):
        yield side
    elif numbers and isinstance(side, int | float) and not isinstance(side, bool):
        yield str(side)
    elif isinstance(side, Mapping):
        for value in [side["content"]] if "content" in side else side.values():
            yield from _texts(value, numbers=numbers)
    elif isinstance(side, list | tuple):
        for item in side:
            yield from _texts(item, numbers=numbers)
