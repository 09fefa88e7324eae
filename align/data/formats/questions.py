"""Find the question and the response of a row under any of their known field names."""

from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text, Turn
from align.data.formats.pairs import as_turns
from align.data.formats.tools import objects_of
from align.data.formats.turns import is_nothing, not_text, refuse_missing, shown, to_text
from align.recipe.schema.formats import ASKED

Row = dict[str, Any]

ANSWERED = ("completion", "response", "output", "solution", "answer")
"""Fields that may contain the answer of a row; the first that is present is used."""
_OBJECT_KEYS = ("response", "text", "output")
_END_MARK = "<|endoftext|>"


def other_fields(row: Row, *used: str) -> Row:
    """Return the fields of a row that are not used."""
    return {key: value for key, value in row.items() if key not in used}


def text_field(row: Row, field: str, source: str) -> str:
    """Return a field that must contain text."""
    value = row.get(field)
    if not isinstance(value, str):
        raise not_text(value, where=f"{source}: {field}")
    return value


def objects_field(row: Row, field: str, source: str) -> list[Row]:
    """Return a field that must contain a list of objects."""
    value = objects_of(row[field], _OBJECT_KEYS, where=f"{source}: {field}")
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(
            f"{source}: {field}: expected a list of objects, found {shown(value)}", code="D050"
        )
    return value


def with_input(instruction: str, given: object, source: str) -> str:
    """Return an instruction followed by its input, if there is one."""
    if given is None or given == "":
        return instruction
    if not isinstance(given, str):
        raise not_text(given, where=f"{source}: input")
    for name, text in (("question", instruction), ("input", given)):
        refuse_missing(text, where=f"{source}: {name}")
    return f"{instruction}\n\n{given}" if instruction else given


def question_of(row: Row, source: str) -> tuple[Text, Row]:
    """Return the question of a row, with its ``input`` and ``history``, and the other fields."""
    name = next(name for name in ASKED if name in row)
    asked = to_text(row[name], field=name, source=source)
    # Unless `input` is the question itself.
    given = row.get("input") if name != "input" else None
    before = _history(row.get("history"), source)
    if isinstance(asked, str):
        asked = with_input(asked, given, source)
    elif given or before:
        raise DataError(
            f"{source}: a {name} of turns cannot be combined with "
            f"'{'input' if given else 'history'}'. "
            "Write it into the turns, or rename it (rename: {input: was_input}).",
            code="D045",
        )
    turns = [*before, *as_turns(asked, "user")]
    return (turns if before else asked), other_fields(row, name, "input", "history")


def _history(value: object, source: str) -> list[Turn]:
    turns: list[Turn] = []
    listed = [] if is_nothing(value) else value
    for i, pair in enumerate(listed if isinstance(listed, list) else [listed]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(
                f"{source}: history: expected [question, answer], found {shown(pair)}; write "
                "turns of {role, content} as messages (map: FILE.py:NAME)",
                code="D050",
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if not isinstance(text, str):
                raise not_text(text, where=f"{source}: history[{i}]: {role}")
            turns.append(Turn(role=role, content=text))
    return turns


def question_and_answer(row: Row, source: str) -> tuple[Text, Text, Row]:
    """Return the question and response of a row, both text or both turns, and the other fields."""
    prompt, rest = question_of(row, source)
    name = next(name for name in ANSWERED if name in rest)
    answer = to_text(rest[name], field=name, source=source)
    rest = other_fields(rest, name)
    if isinstance(prompt, str) and isinstance(answer, str):
        # Drop the stop marker of old completion files; the tokenizer's own stop token replaces it.
        return prompt, answer.removesuffix(_END_MARK), rest
    return as_turns(prompt, "user"), as_turns(answer, "assistant"), rest


def prompt_of(example: Example) -> Text:
    """Return an example's prompt; of a conversation without one, all turns before its response."""
    if example.prompt or example.completion is None or isinstance(example.completion, str):
        return example.prompt
    turns = list(example.completion)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns
