"""Check and convert the turns of a conversation under any of their known field names."""

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from math import isfinite
from typing import Any

from align.core.errors import DataError
from align.core.text import suggest
from align.core.types import Text, Turn
from align.data.formats.fields import fields_inside, is_about_loss
from align.data.formats.missing import is_missing, may_be_missing
from align.data.formats.tools import call_of, calls_of, is_call, objects_of

Row = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_MEANT = {
    "human": "user",
    "prompter": "user",
    "bot": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "tool": "tool",
}
_ROLE_NAMES = frozenset((*ROLES, *_MEANT, *_SHAREGPT_ROLES))
TURN_FIELDS = (
    *("messages", "conversations", "prompt", "completion", "chosen", "rejected"),
    *("chosen_messages", "rejected_messages", "preferred_output", "non_preferred_output"),
)
"""Fields that may hold turns."""
_TURNS_AS_TEXT = re.compile(r"\s*\[\s*\{\s*[\"'](role|from|content|value)[\"']\s*:")
_ONE_RESPONSE = ("completion", "response", "output", "solution", "answer", "chosen", "rejected")
"""Fields with one response, of which rows often have a list."""
_CALLS = ("function_call", "tool_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = (
    "weight",
    "loss_weight",
    "loss",
    "loss_mask",
    "train",
    "training",
    "trainable",
    "train_on_turn",
)
_SWITCHES = frozenset(("on", "off", "true", "false", "yes", "no", "enabled", "disabled", "auto"))
_SWITCHES |= {"none", "low", "medium", "high", "0", "1"}
_USED = (
    *("role", "content", "from", "value"),
    *("tool_calls", "function_call", "tool_call_id", "name"),
    *_REASONING,
    *_WEIGHTS,
)
_HARMLESS = (
    *("id", "message_id", "uuid", "idx", "index", "lang", "language", "model", "metadata"),
    *("timestamp", "created_at", "create_time", "date"),
)
"""Keys that contain neither text nor loss settings; their values are dropped."""
_PLAIN_TURN = {"role", "content"}
_PLACEHOLDER = re.compile(r"^<(?:image|video|audio)>(?:\n|$)|\n<(?:image|video|audio)>$")
"""As rows of LLaVA and LLaMA-Factory have it."""
_PARTS = ("text", "input_text", "output_text")


def parse_turns(row: Row, *, source: str) -> Row:
    """Return the row with turns that were written as text, as CSV files have them, parsed.

    The text is JSON or a Python literal. Used unparsed, it would be trained as the text of a
    plain prompt or response.

    Raises:
        DataError: a field begins like a list of turns and is neither of the two.
    """
    found = {}
    for field in TURN_FIELDS:
        text = row.get(field)
        if isinstance(text, str) and _TURNS_AS_TEXT.match(text):
            value = _literal(text)
            if not isinstance(value, list):
                raise DataError(
                    f"{source}: {field}: turns written as text that is neither JSON nor a Python "
                    f"literal: {text:.60}... Write the column with json.dumps, or the file "
                    "as JSON Lines or Parquet.",
                    code="D050",
                )
            found[field] = value
    return {**row, **found} if found else row


def _literal(text: str) -> Any:
    parsers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
    for parse in parsers:
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def is_nothing(value: object) -> bool:
    """Return whether a field is empty, so that dropping it loses nothing."""
    return isinstance(value, str | list | dict | None) and not value


def refuse_switch(value: object, *, where: str) -> None:
    """Raise if a field for reasoning is a switch (``on``, ``high``), which is not a text to train.

    Raises:
        DataError: it is one.
    """
    if isinstance(value, str) and value.strip().lower() in _SWITCHES:
        name = where.rpartition(" ")[2].rpartition(".")[2]
        raise DataError(
            f"{where}: {value!r} is a switch and no text of a reasoning, as which it would be "
            f"trained; remove it, rename it (rename: {{{name}: {name}_mode}}), or pass it to the "
            "template (chat_template_kwargs)",
            code="D045",
        )


def refuse_missing(value: str, *, where: str) -> None:
    """Raise if a text beside the question is a word for a missing value, such as ``nan``.

    Raises:
        DataError: it is one.
    """
    if is_missing(value) or may_be_missing(value):
        raise DataError(
            f"{where} is {value.strip()!r}, a missing value written as text, which would become "
            "a part of the row; leave the field empty",
            code="D054",
        )


def to_turns(value: object, *, field: str, source: str) -> list[Turn]:
    """Return a checked list of turns; the text parts of a content list are joined.

    Raises:
        DataError: not a list of turns, an unknown role or key, or a content that is not text.
    """
    if isinstance(value, dict):
        value = objects_of(value, ("role", "from"), where=f"{source}: {field}")
        value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{source}: {field}: expected a list of turns, found {shown(value)}", code="D050"
        )
    return [
        _plain_turn(turn) or _turn(turn, f"{source}: {field}[{i}]") for i, turn in enumerate(value)
    ]


def is_role(value: object) -> bool:
    """Return whether a value names who says a turn, in any known spelling."""
    return isinstance(value, str) and value.lower() in _ROLE_NAMES


def _plain_turn(turn: object) -> Turn | None:
    """Return a turn that has nothing else to check, as most turns, else None."""
    if isinstance(turn, dict) and turn.keys() == _PLAIN_TURN:
        role, content = turn["role"], turn["content"]
        # A role of another type cannot be looked up.
        if isinstance(role, str) and role in ROLES and isinstance(content, str):
            return None if _may_begin_or_end_in_tag(content) else Turn(role=role, content=content)
    return None


def _turn(turn: object, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(
            f"{where}: expected a turn, found {shown(turn)}{_advice(turn, where)}", code="D050"
        )
    said = "from" if "from" in turn and "role" not in turn else "role"
    text = "value" if "value" in turn and "content" not in turn else "content"
    _check_keys(turn, said=said, text=text, where=where)
    role = _role_of(turn[said], _SHAREGPT_ROLES if said == "from" else ROLES, key=said, where=where)
    content, reasoning, calls = _content_of(turn.get(text), turn, text=text, where=where)
    _refuse_placeholder(content, where)
    if reasoning and role != "assistant":
        raise DataError(f"{where}: reasoning in a turn of {role}, expected assistant", code="D056")
    if calls and role != "assistant":
        raise DataError(f"{where}: tool_calls in a turn of {role}, expected assistant", code="D057")
    found = Turn(role=role, content=content)
    if reasoning:
        found["reasoning_content"] = reasoning
    if calls:
        found["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if not is_nothing(turn.get(key)):
            found[key] = str(turn[key])
    weight = _weight_of(turn, role, where)
    if weight != 1.0:
        found["weight"] = weight
    return found


def _may_begin_or_end_in_tag(content: str) -> bool:
    return "<" in (content[:1], content[-7:-6])


def _refuse_placeholder(content: str, where: str) -> None:
    """Raise if a line at the beginning or end of a turn stands for an image that is elsewhere."""
    if _may_begin_or_end_in_tag(content) and (found := _PLACEHOLDER.search(content)):
        raise DataError(
            f"{where}: the line {found[0].strip()!r} stands for an image, video or audio, which "
            "the model would not see; remove the row, or the line",
            code="D056",
        )


def _advice(turn: object, where: str) -> str:
    """Return what to do with something that is not a turn; "" if nothing is known."""
    if not isinstance(turn, str):
        return ""
    if where.rpartition(" ")[2].startswith(_ONE_RESPONSE):
        return (
            ". Of several responses, write one, or a row for each; a table whose columns are "
            "lists becomes rows (map: FILE.py:NAME)"
        )
    return "; a text alone does not say who says it. Write {role, content} (map: FILE.py:NAME)"


def _check_keys(turn: Row, *, said: str, text: str, where: str) -> None:
    """Raise unless the turn has a role and a content, and no key that would be dropped."""
    # A turn that only calls tools needs no content.
    called = not is_nothing(turn.get("tool_calls")) or not is_nothing(turn.get("function_call"))
    needed = (said,) if called else (said, text)
    for key in needed:
        if key not in turn:
            near = next((k for k in turn if guess(k, [key])), None)
            hint = "; write {role, content} (map: FILE.py:NAME)"
            hint = f"; did you mean '{key}' by '{near}'?" if near else hint
            if all(map(str.isdecimal, turn)):
                # pandas' DataFrame.to_json writes each column as an object of row numbers.
                hint = "; the file lists its columns: to_json(orient='records', lines=True)"
            raise DataError(
                f"{where}: no '{key}' in a turn with {sorted(turn)}{hint}",
                code="D052" if near else "D051",
            )
    strange = [k for k in turn if k not in (*_USED, *_HARMLESS) and not is_nothing(turn[k])]
    for key, value in fields_inside({"metadata": turn.get("metadata")}):
        name = key.rpartition(".")[2]
        if name in _REASONING or is_about_loss(name, value):
            raise DataError(
                f"{where}: {key}: {shown(value)} would be left out; move it into the turn itself, "
                "or remove it",
                code="D059",
            )
    if strange:
        hint = guess(strange[0], _USED)
        remedy = "; remove it, or write its text into content"
        if is_about_loss(strange[0], turn[strange[0]]):
            remedy = "; write weight: 0 into each turn that is not trained, and remove it"
        raise DataError(
            f"{where}: unknown key '{strange[0]}' of a turn, {shown(turn[strange[0]])}, would be "
            f"left out{hint or remedy}",
            code="D052" if hint else "D059",
        )


def _role_of(role: object, known: Iterable[str], *, key: str, where: str) -> str:
    if isinstance(role, str) and role in known:
        return _SHAREGPT_ROLES[role] if key == "from" else role
    plain = str(role).lower()
    meant = _MEANT.get(plain) if key == "role" else plain if plain in known else None
    hint = f"; did you mean '{meant}'?" if meant else guess(str(role), known)
    raise DataError(
        f"{where}: {key} {role!r}: expected one of {tuple(known)}{hint}",
        code="D053",
    )


def _content_of(
    value: object, turn: Row, *, text: str, where: str
) -> tuple[str, str, list[dict[str, Any]]]:
    """Return a turn's text, reasoning and tool calls, from its content and the keys beside it."""
    if turn.get("from") in _CALLS and is_call(value):
        return "", "", calls_of(value, where=f"{where}.{text}")
    named = [key for key in _REASONING if not is_nothing(turn.get(key))]
    for key in named:
        refuse_switch(turn[key], where=f"{where}.{key}")
    reasons = list(dict.fromkeys(_text(turn[key], f"{where}.{key}") for key in named))
    if len(reasons) > 1:
        raise DataError(f"{where}: {' and '.join(named)} differ; keep one", code="D056")
    calls = calls_of(turn.get("tool_calls"), where=f"{where}.tool_calls")
    if not is_nothing(turn.get("function_call")):
        calls.append(call_of(turn["function_call"], where=f"{where}.function_call"))
    if isinstance(value, list):
        said, thought, called = _parts_of(value, f"{where}.{text}")
        return said, "\n".join([*reasons, *thought]), [*calls, *called]
    if value is None and calls:
        return "", "".join(reasons), calls
    return _text(value, f"{where}.{text}"), "".join(reasons), calls


def _parts_of(parts: list[Any], where: str) -> tuple[str, list[str], list[dict[str, Any]]]:
    """Return the text, the reasoning and the tool calls of a content's parts, in this order."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = (
            part.get("type", "text" if "text" in part else None)
            if isinstance(part, dict)
            else type(part).__name__
        )
        value = (
            next((part[k] for k in ("text", "value", kind) if k in part), None) if kind else None
        )
        if kind == "tool_call" and is_call(value):
            calls += calls_of(value, where=where)
        elif kind in _PARTS and isinstance(value, str) and not calls:
            texts.append(value)
        elif kind in _REASONING and isinstance(value, str) and not texts and not calls:
            thoughts.append(value)
        else:
            raise DataError(
                f"{where}: a part of type {kind!r} cannot be kept; only reasoning, text and "
                "tool_call parts, in this order. Write calls as tool_calls of the turn and results "
                "as turns of role tool (map: FILE.py:NAME); images, video and audio are not read",
                code="D056",
            )
    return "\n".join(texts), thoughts, calls


def _weight_of(turn: Row, role: str, where: str) -> float:
    """Return the loss weight of a turn: 1 unless one of its keys sets another value."""
    given = {key: turn[key] for key in _WEIGHTS if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or not isfinite(value) or value < 0:
            raise DataError(
                f"{where}.{key}: expected true, false or a number from 0, found {shown(value)}",
                code="D058",
            )
    found = {float(value) for value in given.values()}
    if len(found) > 1:
        raise DataError(f"{where}: {' and '.join(given)} differ; keep one", code="D058")
    if role != "assistant":
        if any(found):
            raise DataError(
                f"{where}: {next(iter(given))} {shown(next(iter(given.values())))} on a turn of "
                f"{role}; only assistant turns are trained, so remove it or set it to 0",
                code="D058",
            )
        return 1.0
    return found.pop() if found else 1.0


def _text(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    raise not_text(value, where=where)


def text_of_parts(value: object, *, where: str) -> str:
    """Return a text that may be a list of its parts.

    Raises:
        DataError: it is neither, or a part is not text.
    """
    if isinstance(value, list):
        said, thoughts, calls = _parts_of(value, where)
        if not thoughts and not calls:
            return said
    return _text(value, where)


def not_text(value: object, *, where: str) -> DataError:
    """Return the error for a field that should contain text."""
    code = "D054" if value is None or isinstance(value, str) else "D055"
    return DataError(f"{where}: expected text, found {shown(value)}", code=code)


def to_text(value: object, *, field: str, source: str) -> Text:
    """Return a field that contains plain text or a conversation, checked.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list | dict):
        wrong = f"{source}: {field}: expected text or a list of turns, found {shown(value)}"
        raise DataError(wrong, code="D050")
    return to_turns(value, field=field, source=source)


def guess(word: str, known: Iterable[str], *, cutoff: float = 0.7) -> str:
    """Return ``suggest`` for a key of a row, of which unlike ones may be columns."""
    return suggest(word, known, cutoff=cutoff)


@cache
def plain_name(key: str) -> str:
    """Return the name of a column in lower case, with underscores between its words."""
    return key.lower().replace(" ", "_").replace("-", "_")


def shown(value: object) -> str:
    """Return a short form of a value for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def text_of(text: Text | None) -> str:
    """Return a text, or the text of all its turns joined by blank lines."""
    if text is None or isinstance(text, str):
        return text or ""
    return "\n\n".join([said for turn in text for said in _said(turn)])


def last_said(text: Text | None) -> str:
    """Return a text, or the content of the last turn."""
    if text is None or isinstance(text, str):
        return text or ""
    return text[-1]["content"] if text else ""


def _said(turn: Turn) -> Iterator[str]:
    if "reasoning_content" in turn:
        yield turn["reasoning_content"]
    yield turn["content"]
    if "tool_calls" in turn:
        yield json.dumps(turn["tool_calls"], ensure_ascii=False)
