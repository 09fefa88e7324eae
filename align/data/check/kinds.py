"""Infer what kind of data a source contains from its first rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from align.core.errors import DataError
from align.data.formats.detect import Kind, detect
from align.data.formats.turns import guess
from align.data.load import rename_fields
from align.data.reading.json import Item, Row
from align.recipe.schema.formats import FORMATS

HEAD_ROWS = 100
_LONGEST_NUMBER = 20
"""Characters; a longer 'answer' is text and not the number of a math task."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the first rows are read: their kind, and the format of most of them."""

    kind: str
    form: str | None


def infer(
    head: Sequence[Item], *, form: str, rename: Mapping[str, str], kind: str | None
) -> Reading:
    """Infer the kind of the first rows from their fields, and the format of most of them.

    Args:
        head: the first rows.
        form: the name of a format, or ``auto``.
        rename: {old: new}.
        kind: the kind, if it is known.
    """
    rows = list(_renamed(head, rename))
    if kind is None:
        votes = Counter(_kind_of(row, form) for row in rows)
        kind = votes.most_common(1)[0][0] if votes else "sft"
    load_kind = cast(Kind, "prompts" if kind == "math" else kind)
    forms = Counter(found for row in rows if (found := _form_of(row, load_kind)) is not None)
    return Reading(kind, forms.most_common(1)[0][0] if forms else None)


def _renamed(head: Sequence[Item], rename: Mapping[str, str]) -> Iterator[Row]:
    for row, source in head:
        if not isinstance(row, DataError):
            with suppress(DataError):
                yield rename_fields(row, rename, source=source)


def _kind_of(row: Row, form: str) -> str:
    if isinstance(row, str):
        return "corpus"
    # Misspelled names count too: the error message should be about the intended kind.
    if _names(tuple(row), "chosen") or _names(tuple(row), "rejected"):
        return "preference"
    found = _form_of(row, "sft") if form == "auto" else form
    gives = FORMATS[found].gives if found in FORMATS else ()
    if found in ("prompt", None) and not _names(tuple(row), "completion") and "prompt" in row:
        return "math" if _is_number(row.get("answer")) else "prompts"
    if found == "messages" and len(row) > 1 and not _is_answered(row["messages"]):
        return "prompts"
    if "unpaired" in gives and ("kto_tag" in row or _names(tuple(row), "label")):
        return "unpaired"
    return gives[0] if gives else "sft"


def _is_answered(turns: object) -> bool:
    """Return False for questions alone, as in OpenAI's reinforcement fine-tuning rows.

    Those rows have further columns for the grader.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return True
    roles = {turn.get("role", turn.get("from")) for turn in turns}
    return bool(roles - {"system", "developer", "user", "human"})


@lru_cache(maxsize=1024)
def _names(fields: tuple[str, ...], word: str) -> bool:
    """Return whether a field has this name, or nearly this name."""
    return any(name == word or guess(name, [word]) for name in fields)


def _is_number(answer: object) -> bool:
    from reward_models.math import final_number

    text = "" if answer is None else str(answer)
    return len(text) <= _LONGEST_NUMBER and final_number(text) is not None


def _form_of(row: Row, kind: Kind) -> str | None:
    try:
        return detect(row, kind=kind, source="")
    except DataError:
        return None
