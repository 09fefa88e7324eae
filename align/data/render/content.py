"""Verify that a chat template renders everything in a row: turns, tools and reasoning, in order."""

import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Turn
from align.data.render.templates import FAMILIES

DROPS = "D116"
"""Code for a row of which the template drops a part."""
_THINK_TAGS = re.compile(r"</?think>")


def message_of(turn: Turn) -> dict[str, Any]:
    """Return a turn as chat templates read it: reasoning under both usual names, without weight."""
    found: dict[str, Any] = dict(turn)
    found.pop("weight", None)
    if "reasoning_content" in turn:
        found["thinking"] = turn["reasoning_content"]
    return found


def check_plain(example: Example, *, reader: str) -> None:
    """Raise if an example has more than plain turn contents, which is all that the reader supports.

    Args:
        example: any example.
        reader: the consumer of the example, for messages.
    """
    sides = (example.prompt, example.completion, example.rejected)
    turns = [turn for side in sides if side and not isinstance(side, str) for turn in side]
    more = [key for key in ("reasoning_content", "tool_calls") if any(key in t for t in turns)]
    more += ["tools"] if example.tools else []
    more += ["chat_template_kwargs"] if example.template_kwargs else []
    if more:
        raise DataError(
            f"{example.source}: {reader} reads the contents of turns only, so {more[0]} would be "
            "dropped. Write it into the content of a turn, or remove it.",
            code=DROPS,
        )


def check_turns(
    turns: Sequence[Turn], rendered: str, *, first: int, source: str, begin: int = 0
) -> int:
    """Return the character at which the last of the turns ends in a rendered text.

    Args:
        turns: some turns of a conversation.
        rendered: the rendered text.
        first: number of the first of the turns, for messages.
        source: ``file:line``, for messages.
        begin: character at which the search begins.

    Raises:
        DataError: the text of a turn is missing or out of order.
    """
    at = begin
    for i, turn in enumerate(turns, start=first):
        for name, text in _texts(turn):
            end = _end_of(text, rendered, at)
            if end is None:
                raise _dropped(f"turn {i}: role {turn['role']}{name}", text, source)
            at = end
    return at


def check_tools(tools: Sequence[Mapping[str, Any]], rendered: str, *, source: str) -> None:
    """Raise unless the names and descriptions of all tools occur in a rendered text."""
    for tool in tools:
        function = tool["function"]
        for text in (function["name"], *_described(function)):
            if _end_of(text, rendered, 0) is None:
                raise _dropped(f"the tool {function['name']!r}", text, source)


def check_shape(
    turns: Sequence[Turn], render: Callable[[Sequence[Turn]], str], *, source: str
) -> None:
    """Raise unless a template renders the content of every turn of a conversation of this shape.

    Each content is replaced by a unique word, so that a turn cannot pass because its text happens
    to be part of another turn.
    """
    marked = [_marked(turn, i) for i, turn in enumerate(turns)]
    try:
        rendered = render(marked)
    except DataError:
        return  # a template may reject these contents; the row itself was rendered
    check_turns(marked, rendered, first=0, source=source)


def shape_of(turns: Sequence[Turn], *options: object) -> Hashable:
    """Return everything but the contents that may change what a template renders."""
    return tuple([(turn["role"], *turn) for turn in turns]), repr(options)


def _marked(turn: Turn, i: int) -> Turn:
    marked: Any = dict(turn)
    if turn["content"]:
        marked["content"] = f"qzx{i}c"
    if "reasoning_content" in turn:
        marked["reasoning_content"] = f"qzx{i}r"
    return marked


def _texts(turn: Turn) -> Iterator[tuple[str, str]]:
    """Yield the texts of a turn in the order of templates, each with its name for messages."""
    if "reasoning_content" in turn:
        yield ", its reasoning", turn["reasoning_content"]
    # Templates may move or drop the tags themselves, but not the text around them.
    said = turn["content"]
    for text in _THINK_TAGS.split(said) if "think>" in said else (said,):
        yield "", text
    for call in turn.get("tool_calls", ()):
        yield ", its tool call", call["function"]["name"]
        for value in _leaves(call["function"]["arguments"]):
            yield ", the arguments of its tool call", value


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _described(schema: object) -> Iterator[str]:
    """Yield the descriptions in a schema and the names of its parameters."""
    if isinstance(schema, list):
        for item in schema:
            yield from _described(item)
    elif isinstance(schema, Mapping):
        for key, value in schema.items():
            if key == "description" and isinstance(value, str):
                yield value
            elif key == "properties" and isinstance(value, Mapping):
                yield from value
            yield from _described(value)


_FORMS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
)


def _end_of(text: str, rendered: str, at: int) -> int | None:
    """Return where a text ends in another, plain or as JSON; surrounding white space is ignored."""
    wanted = text.strip()
    if not wanted:
        return at
    # Templates write arguments of tool calls as JSON, with or without escapes.
    for write in _FORMS:
        form = write(wanted)
        found = rendered.find(form, at)
        if found >= 0:
            return found + len(form)
    return None


def _dropped(what: str, text: str, source: str) -> DataError:
    return DataError(
        f"{source}: the chat template drops {what} ({text.strip()[:40]!r}). Choose a template that "
        "renders it (stages.<base>.tokenizer.chat_template: qwen3 writes tools, tool calls and "
        "reasoning), or write it into the content of a turn.",
        code=DROPS,
    )


def check_prefix(before: str, after: str, *, source: str) -> None:
    """Raise DataError if a longer conversation does not begin with the text of a shorter one."""
    if after.startswith(before):
        return
    at = next(
        (k for k, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    raise DataError(
        f"{source}: the chat template rewrites earlier turns, so the trained tokens cannot be "
        f"identified; first difference at character {at}: {before[at : at + 40]!r} becomes "
        f"{after[at : at + 40]!r}; Use a template that only appends: "
        f"stages.<base>.tokenizer.chat_template: {', '.join(FAMILIES)}"
    )


def is_tie(example: Example) -> bool:
    """Return the column ``tie`` of a pair; without it, the pair has a winner.

    Raises:
        DataError: the value is neither true nor false.
    """
    tie = example.columns.get("tie", False)
    if isinstance(tie, str) and tie.lower() in ("true", "false"):
        tie = tie.lower() == "true"  # CSV files have no booleans
    if not isinstance(tie, bool):
        raise DataError(f"{example.source}: tie: expected true or false, found {tie!r}")
    return tie
