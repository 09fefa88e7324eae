"""Apply ``--set stages.ppo.kl.coef=0.1`` overrides to a recipe."""

from collections.abc import Sequence
from typing import Any

import yaml

from align.core.text import shown, suggest
from align.recipe.source import Mark, Source, dotted, forget, parse_value

ORIGIN = "--set"


def apply_overrides(source: Source, overrides: Sequence[str]) -> None:
    """Change ``source`` in place and add invalid overrides to its errors.

    Args:
        source: the recipe's data and marks.
        overrides: ``key.path=value`` texts; the value is YAML, and an index selects a list item.
    """
    for text in overrides:
        path, equals, value_text = text.partition("=")
        if not equals or not path.strip():
            source.errors.append(
                f"{ORIGIN}: found '{text}'; expected key.path=value, such as stages.sft.epochs=2"
            )
            continue
        try:
            value = parse_value(value_text, path.strip(), source.errors)
        except yaml.YAMLError as e:
            problem = " ".join(str(e).split())
            source.errors.append(f"{ORIGIN}: {path}: '{value_text}' is not valid YAML: {problem}")
            continue
        problem = _put(source, path.strip().split("."), value)
        if problem:
            source.errors.append(f"{ORIGIN}: {path}: {problem}")


def _put(source: Source, parts: Sequence[str], value: object) -> str | None:
    """Set one value and create the mappings along its path; return the problem, if any."""
    holder: Any = source.data
    key: tuple[str | int, ...] = ()
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(holder, list):
            if not part.isdigit() or int(part) >= len(holder):
                return (
                    f"'{dotted(key)}' is a list of {len(holder)}; expected an index from 0 to "
                    f"{len(holder) - 1} instead of '{part}'"
                )
            step: Any = int(part)
        elif isinstance(holder, dict):
            step = part
            # A typo in a stage's name must not create a stage; a whole new stage may be set.
            if key == ("stages",) and part not in holder and not (last and isinstance(value, dict)):
                return f"no stage '{part}'; stages are {', '.join(holder)}{suggest(part, holder)}"
            if not last and holder.get(part) is None:
                holder[part] = {}
                source.marks[(*key, part)] = Mark(ORIGIN)
        else:
            return f"'{dotted(key)}' is {shown(holder)}, which has no keys"
        key, above = (*key, step), holder
        holder = above[step] if not last else None
        if last:
            above[step] = value
            forget(source.marks, key)
            _mark(source, key, value)
    return None


def _mark(source: Source, key: tuple[str | int, ...], value: object) -> None:
    source.marks[key] = Mark(ORIGIN)
    if isinstance(value, dict):
        for name, inside in value.items():
            _mark(source, (*key, name), inside)
    elif isinstance(value, list):
        for i, inside in enumerate(value):
            _mark(source, (*key, i), inside)
