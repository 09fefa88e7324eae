"""Advice for a row of no known format: names that would be read, or why no name helps."""

import re
from collections.abc import Mapping
from typing import Any

from align.data.formats.turns import guess, plain_name
from align.recipe.schema.formats import FORMATS

_KNOWN = frozenset(field for form in FORMATS.values() for option in form.fields for field in option)
_MEANT = {
    **dict.fromkeys(("inputs", "article", "document", "goal", "question_stem"), "prompt"),
    **dict.fromkeys(("targets", "target", "generation", "summary", "highlights"), "completion"),
    **dict.fromkeys(("canonical_solution", "correct_answer", "reference_answer"), "completion"),
    **dict.fromkeys(("conversation", "dialogue", "dialog"), "messages"),
    **dict.fromkeys(("content", "sentence", "story", "body"), "text"),
    **dict.fromkeys(("chosen_response", "response_chosen"), "chosen"),
    **dict.fromkeys(("rejected_response", "response_rejected"), "rejected"),
}
"""What fields of common data sets (FLAN, Aya, LMSYS, CNN) are called here."""
_ONE_OF_SEVERAL = re.compile(r"(.*[a-z])_?([0-9]|[ab])")


def near_misses(row: Mapping[str, Any]) -> str:
    """Return the known names that unknown keys resemble, and the keys that are several answers."""
    several: dict[str, list[str]] = {}
    for key in row:
        if key not in _KNOWN and (found := _ONE_OF_SEVERAL.fullmatch(plain_name(key))):
            several.setdefault(found[1], []).append(key)
    listed = {stem: keys for stem, keys in several.items() if len(keys) > 1}
    answers = [keys for stem, keys in listed.items() if guess(stem, _KNOWN)]
    said = "".join(
        f"; {' and '.join(keys)} are several answers: write the better one as chosen, the worse as "
        "rejected (map: FILE.py:NAME)"
        for keys in answers
    )
    single = [
        key for key in row if key not in _KNOWN and not any(key in k for k in listed.values())
    ]
    near = {key: guess(key.lower(), _KNOWN) for key in single}
    return said + "".join(f"{hint} (by '{key}')" for key, hint in near.items() if hint)


def renamed(row: Mapping[str, Any], *, answer: str) -> dict[str, str]:
    """Return a ``rename`` of the row's keys to names that are known; {} if there is none.

    Args:
        row: fields of the row.
        answer: the name of its answer.
    """
    found: dict[str, str] = {}
    for key in row:
        name = plain_name(key)
        meant = name if name in _KNOWN else _MEANT.get(name, "")
        meant = answer if meant == "completion" else meant
        if key not in _KNOWN and meant and meant not in (*row, *found.values()):
            found[key] = meant
    return found
