"""Convert tool schemas and tool calls to the form that chat templates expect."""

import json
from collections.abc import Sequence
from typing import Any

from align.core.errors import DataError

Item = dict[str, Any]


def parsed(value: object) -> Any:
    """Return the value of a JSON string; anything else, including invalid JSON, is unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def objects_of(value: Any, keys: Sequence[str], *, where: str) -> Any:
    """Return the list of objects that a value stores as one list per key; else the value.

    This is how ``datasets`` stores a sequence of objects.

    Args:
        value: anything.
        keys: keys of such objects; a list under one of them means that every key has a list.
        where: the place, for messages.

    Raises:
        DataError: the lists differ in length.
    """
    if not isinstance(value, dict) or not any(isinstance(value.get(key), list) for key in keys):
        return value
    columns = {key: items for key, items in value.items() if items is not None}
    sizes = {len(items) if isinstance(items, list) else -1 for items in columns.values()}
    if len(sizes) > 1 or -1 in sizes:
        raise DataError(
            f"{where}: objects as columns ({', '.join(value)}) whose lists differ in length; "
            "expected one item per object in each",
            code="D050",
        )
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def schemas_of(value: object, *, where: str) -> tuple[Item, ...]:
    """Return tool schemas as ``{"type": "function", "function": {...}}``.

    Args:
        value: a list of schemas (with or without that wrapper) or JSON strings, or one JSON string
            with the whole list.
        where: the place, for messages.

    Raises:
        DataError: the value is something else.
    """
    found = parsed(value)
    if found is None or found == "":
        return ()
    found = objects_of(found, ("function", "name"), where=where)
    listed = [parsed(item) for item in (found if isinstance(found, list) else [found])]
    schemas = []
    for i, item in enumerate(listed):
        function = _function_of(item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}[{i}]: expected the schema of a tool with a name, found {item!r:.60}. If "
                "it is not a schema, rename the column with 'rename'.",
                code="D057",
            )
        # Both are in use: the form of the API, and the function alone.
        wrapped = item if "function" in item else {"function": function}
        schemas.append({"type": "function", **wrapped})
    return tuple(schemas)


def _function_of(item: Item) -> Any:
    """Return the function of a schema in the layouts of OpenAI (nested or flat) and Anthropic."""
    if "function" in item:
        return item["function"]
    names = {"input_schema": "parameters"}
    return {names.get(key, key): value for key, value in item.items() if key != "type"}


def is_call(value: object) -> bool:
    """Return whether a value is a tool call or a list of them, as a JSON string or parsed."""
    found = parsed(value)
    items = found if isinstance(found, list) else [found]
    return bool(items) and all(
        isinstance(item, dict) and {"name", "arguments"} <= set(item.get("function", item))
        for item in items
    )


def calls_of(value: object, *, where: str) -> list[Item]:
    """Return tool calls with parsed arguments, as servers pass them to a chat template.

    Raises:
        DataError: an entry has no name and arguments, or its arguments are not a JSON object.
    """
    found = parsed(value)
    if found is None or found == "":
        return []
    found = objects_of(found, ("function", "name"), where=where)
    items = found if isinstance(found, list) else [found]
    return [call_of(item, where=f"{where}[{i}]") for i, item in enumerate(items)]


def call_of(value: object, *, where: str) -> Item:
    """Return one tool call; see ``calls_of``."""
    item = parsed(value)
    call = item.get("function", item) if isinstance(item, dict) else None
    arguments = parsed(call.get("arguments")) if isinstance(call, dict) else None
    # Some servers write a call without arguments as an empty string.
    if arguments == "":
        arguments = {}
    if (
        not isinstance(call, dict)
        or not isinstance(call.get("name"), str)
        or not isinstance(arguments, dict)
    ):
        raise DataError(
            f"{where}: expected a tool call with name and arguments (an object, or its JSON), "
            f"found {item!r:.60}",
            code="D057",
        )
    known = ("name", "arguments", "id", "type", "index", "function")
    strange = [k for k in (*item, *call) if k not in known and item.get(k, call.get(k))]
    if strange:
        raise DataError(
            f"{where}: unknown key '{strange[0]}' of a tool call would be dropped. Remove it.",
            code="D057",
        )
    named = {"id": item["id"]} if item.get("id") else {}
    return {**named, "type": "function", "function": {"name": call["name"], "arguments": arguments}}
