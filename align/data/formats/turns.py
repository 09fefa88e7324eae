"""Check and convert turns of a conversation, whatever names a format gives them."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from align.core.errors import DataError
from align.core.types import Text, Turn

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
    "observation": "tool",
    "tool": "tool",
}


def to_turns(value: Any, *, field: str, source: str) -> list[Turn]:
    """Check a list of turns; text parts of a content list are joined.

    Raises:
        DataError: not a list of turns, an unknown role, a content that is not text.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{source}: {field}: expected a list of turns, found {shown(value)}", code="D050"
        )
    return [_turn(turn, field=f"{field}[{i}]", source=source) for i, turn in enumerate(value)]


def _turn(turn: Any, *, field: str, source: str) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(f"{source}: {field}: expected a turn, found {shown(turn)}", code="D050")
    if "from" in turn and "value" in turn:
        return _sharegpt_turn(turn, field=field, source=source)
    for key in ("role", "content"):
        if key not in turn:
            near = next((k for k in turn if guess(k, [key])), None)
            hint = f"; did you mean '{key}' by '{near}'?" if near else ""
            raise DataError(
                f"{source}: {field}: no '{key}' in a turn with {sorted(turn)}{hint}",
                code="D052" if near else "D051",
            )
    role = turn["role"]
    if role not in ROLES:
        meant = _MEANT.get(str(role).lower())
        hint = f"; did you mean '{meant}'?" if meant else guess(str(role), ROLES)
        raise DataError(
            f"{source}: {field}: role {role!r}: expected one of {ROLES}{hint}", code="D053"
        )
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            raise DataError(
                f"{source}: {field}: {key} cannot be kept; write the call as text in 'content'",
                code="D057",
            )
    weight = turn.get("weight", turn.get("loss_weight"))
    if role == "assistant" and weight is not None and weight != 1:
        raise DataError(
            f"{source}: {field}: an assistant turn of weight {weight} cannot be kept; "
            "only weight 1 is trained",
            code="D058",
        )
    content = _content(turn["content"], field=f"{field}.content", source=source)
    return Turn(role=role, content=content)


def _content(value: Any, *, field: str, source: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            text = part.get("text", part.get("value")) if kind == "text" else None
            if not isinstance(text, str):
                raise DataError(
                    f"{source}: {field}: a part of type {kind!r} cannot be kept; only text parts",
                    code="D056",
                )
            texts.append(text)
        return "\n".join(texts)
    raise not_text(value, field=field, source=source)


def not_text(value: Any, *, field: str, source: str) -> DataError:
    """Make the error of a field that should hold text."""
    code = "D054" if value is None or isinstance(value, str) else "D055"
    return DataError(f"{source}: {field}: expected text, found {shown(value)}", code=code)


def _sharegpt_turn(turn: Row, *, field: str, source: str) -> Turn:
    role = _SHAREGPT_ROLES.get(turn["from"])
    if role is None:
        hint = guess(str(turn["from"]), _SHAREGPT_ROLES)
        raise DataError(
            f"{source}: {field}: from {turn['from']!r}: expected one of "
            f"{tuple(_SHAREGPT_ROLES)}{hint}",
            code="D053",
        )
    value = turn["value"]
    if turn["from"] == "function_call" and not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    return Turn(role=role, content=_content(value, field=f"{field}.value", source=source))


def to_text(value: Any, *, field: str, source: str) -> Text:
    """Check a field that holds plain text or a conversation.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, str):
        return value
    return to_turns(value, field=field, source=source)


def guess(word: str, known: Iterable[str]) -> str:
    """Give "; did you mean ...?" with the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.7)
    return f"; did you mean '{near[0]}'?" if near else ""


def shown(value: Any) -> str:
    """Give a short form of a value for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
