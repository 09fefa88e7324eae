"""Write a resolved recipe as YAML, with the origin of every value as a comment."""

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from align.core.text import hidden
from align.recipe.algorithms import ALGORITHMS
from align.recipe.load import Resolved
from align.recipe.schema import OnlineStage
from align.recipe.source import plain_scalar


def resolved_yaml(resolved: Resolved, *, origins: bool = True) -> str:
    """Return a recipe with all its defaults as YAML.

    Args:
        resolved: a valid recipe.
        origins: append to each value its ``file:line``, ``--set`` or ``default``.

    Returns:
        YAML that loads to the same recipe.
    """
    lines: list[tuple[str, str]] = []  # (text, origin)
    _write(resolved.data, resolved.origins, lines)
    for name, spec in resolved.recipe.stages.items():
        if isinstance(spec, OnlineStage):
            _explain(lines, name, getattr(spec, "algorithm", spec.kind))
    if not origins:
        return "".join(text + "\n" for text, _ in lines)
    # Align the origins in one column, unless a long value would move it far to the right.
    width = min(60, max(len(text) for text, origin in lines if origin))
    return "".join(
        (f"{text:<{width}}  # {origin}" if origin else text) + "\n" for text, origin in lines
    )


def resolved_json(resolved: Resolved) -> dict[str, Any]:
    """Return a recipe with all its defaults, and the origin of each value by its dotted key.

    Secrets from the environment are written as ``${NAME}``.
    """
    return {"recipe": hidden(resolved.data), "origins": dict(resolved.origins)}


def _explain(lines: list[tuple[str, str]], stage: str, algorithm: str) -> None:
    """Insert the algorithm's formula below the name of the stage."""
    begin = next(i for i, line in enumerate(lines) if line[0] == f"  {_scalar(stage)}:")
    says = ALGORITHMS[algorithm].says
    wrapped = textwrap.wrap(f"{algorithm}: {says}", 92) if says else []
    lines[begin + 1 : begin + 1] = [(f"    # {line}", "") for line in wrapped]


def _write(
    value: Mapping[str, Any] | list[Any],
    origins: Mapping[str, str],
    lines: list[tuple[str, str]],
    *,
    key: str = "",
    indent: str = "",
) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, inside in items:
        here = f"{key}.{name}" if key else str(name)
        head = f"{indent}{_scalar(name)}:" if isinstance(value, dict) else f"{indent}-"
        if isinstance(inside, dict | list) and inside and not _flat(inside):
            start = len(lines)
            lines.append((head, ""))
            _write(inside, origins, lines, key=here, indent=indent + "  ")
            if isinstance(value, list):
                # The first key of a mapping in a list is on the line of its dash.
                text, origin = lines.pop(start + 1)
                lines[start] = (f"{head} {text.lstrip()}", origin)
        else:
            # A flat list is on one line; its first item tells where it was written.
            first = f"{here}.0" if isinstance(inside, list) and inside else here
            lines.append((f"{head} {_inline(inside)}", origins.get(first, "")))


def _flat(value: object) -> bool:
    return isinstance(value, list) and not any(isinstance(v, dict | list) for v in value)


def _inline(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(v, quoted=True) for v in value) + "]"
    return "{}" if value == {} else _scalar(value)


def _scalar(value: object, *, quoted: bool = False) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    # Escape "${", and quote everything that YAML could read as something other than text.
    text = value.replace("${", "$${")
    simple = text.replace("_", "").replace("-", "").replace(".", "").replace("/", "").isalnum()
    ascii_word = simple and text.isascii() and text[0].isalnum() and plain_scalar(text) == text
    return text if ascii_word and not quoted else json.dumps(text, ensure_ascii=False)
