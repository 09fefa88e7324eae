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
    "generated_solution": "completion",
    **dict.fromkeys(("canonical_solution", "correct_answer", "reference_answer"), "completion"),
    **dict.fromkeys(("conversation", "dialogue", "dialog"), "messages"),
    **dict.fromkeys(("content", "sentence", "story", "body"), "text"),
    **dict.fromkeys(("chosen_response", "response_chosen"), "chosen"),
    **dict.fromkeys(("rejected_response", "response_rejected"), "rejected"),
}
"""What fields of common data sets (FLAN, Aya, LMSYS, CNN) are called here."""
_ONE_OF_SEVERAL = re.compile(r"(.*[a-z])_?([0-9]|[ab])")


_HOLDERS = ("data", "rows", "examples", "items", "records", "instances", "train", "test")


def layout_advice(row: Mapping[str, Any]) -> str:
    """Return how to write a row of a known data set, or of a whole file; "" if it is neither."""
    for fields, kind, advice in _LAYOUTS:
        if all(_is_of(row.get(field), kind) for field in fields):
            return f"; {advice} (map: FILE.py:NAME)"
    for key in _HOLDERS:
        if _is_of(row.get(key), list):
            return (
                f"; the file is one object with its rows in '{key}': write each of them as a line "
                f"of its own (jq -c '.{key}[]')"
            )
    return ""


def _is_of(value: object, kind: type) -> bool:
    """Return whether a value has a type; a list must contain objects."""
    if isinstance(value, list) and kind is list:
        return bool(value) and all(isinstance(item, dict) for item in value)
    return isinstance(value, kind)


_LAYOUTS: tuple[tuple[tuple[str, ...], type, str], ...] = (
    (
        ("history", "human_ref_A", "human_ref_B"),
        str,
        "rows of SHP: write history as prompt, and as chosen the response that labels names (1 is "
        "human_ref_A, 0 is human_ref_B)",
    ),
    (
        ("answers",),
        list,
        "several answers: write the best one as chosen and the worst as rejected (in rows of "
        "Nectar, rank 1 is the best), or one of them as completion",
    ),
    (
        ("chat",),
        dict,
        "rows of MOSS: write the texts under Human and MOSS as turns of user and assistant, "
        "without their marks (<|Human|>, <eoh>)",
    ),
    (
        ("chat",),
        str,
        "a conversation as one text: split it at its marks (USER:, ASSISTANT:, FUNCTION RESPONSE: "
        "in rows of glaive) into messages of user, assistant and tool, and write schemas as tools",
    ),
    (
        ("contents",),
        list,
        "turns of Gemini: write them as messages of role and content (model is assistant, the "
        "texts of parts are the content, systemInstruction is a turn of system)",
    ),
    (
        ("question", "label"),
        dict,
        "rows of PRM800K: write question.problem as prompt, and as steps the chosen text of each "
        "of label.steps with its rating as label (1 is true, -1 is false)",
    ),
    (
        ("input", "label", "task"),
        str,
        "rows of Math-Shepherd: write what is before 'Step 1' as prompt, and the lines after it as "
        "steps, whose label is the last sign of their line in label (+ is true, - is false)",
    ),
    (
        ("response",),
        dict,
        "an object as response: in the output of OpenAI's batches, append "
        "response.body.choices[0].message to the body.messages of the request with its custom_id",
    ),
    (
        ("conversation_a", "conversation_b"),
        list,
        "two conversations: write the one that winner names as chosen and the other as rejected",
    ),
)
"""Fields of layouts that no rename reads, the type of their values, and what to write instead."""


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
        inner = _inner_names(row, key)
        found |= {f"{key}.{name}": name for name in inner}
        if inner:
            continue
        name = plain_name(key)
        meant = name if name in _KNOWN else _MEANT.get(name, "")
        meant = answer if meant == "completion" else meant
        if key not in _KNOWN and meant and meant not in (*row, *found.values()):
            found[key] = meant
    return found


def _inner_names(row: Mapping[str, Any], key: str) -> list[str]:
    """Return the known names in an object of the row that has a format by itself."""
    inner = row[key] if isinstance(row[key], dict) and key not in _KNOWN else {}
    whole = [form.most_fields(inner) for form in FORMATS.values()]
    return sorted(max(whole, key=len, default=frozenset()) - row.keys())
