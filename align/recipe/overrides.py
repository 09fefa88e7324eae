"""Apply ``--set ppo.kl.coef=0.1`` overrides to a recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from align.core.text import shown, suggest
from align.recipe.schema import Recipe
from align.recipe.source import Mark, Source, dotted, forget, parse_value

ORIGIN = "--set"


def apply_overrides(source: Source, overrides: Sequence[str]) -> None:
    """Change ``source`` in place and add invalid overrides to its errors.

    Args:
        source: the recipe's data and marks.
        overrides: ``key.path=value`` texts; the value is YAML, and an index selects a list item.
            A path may begin with a stage's name, and ``stages.0`` is the first stage.
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
        parts = _whole(path.strip().split("."), source.data)
        problem = _unknown(parts, source.data) or _put(source, parts, value)
        if problem:
            source.errors.append(f"{ORIGIN}: {path}: {problem}")


def _whole(parts: list[str], data: Mapping[str, Any]) -> list[str]:
    """Return the path from the recipe's root, given one that may begin with a stage.

    A stage has a name and a place, and neither is a key of the recipe: ``ppo.steps``
    and ``stages.0.steps`` stand for ``stages.ppo.steps``.
    """
    stages = data.get("stages")
    if not isinstance(stages, dict):
        return parts
    names = [str(name) for name in stages]
    if parts[0] in names and parts[0] not in Recipe.model_fields:
        return ["stages", *parts]
    if len(parts) > 1 and parts[0] == "stages" and parts[1].isdigit() and parts[1] not in names:
        place = int(parts[1])
        return ["stages", names[place], *parts[2:]] if place < len(names) else parts
    return parts


def _unknown(parts: Sequence[str], data: Mapping[str, Any]) -> str | None:
    """Return the problem of a longer path that begins with neither a key nor a stage."""
    stages = data.get("stages")
    if len(parts) < 2 or parts[0] in Recipe.model_fields or not isinstance(stages, dict):
        return None
    near = suggest(parts[0], [*stages, *Recipe.model_fields])
    return f"no key and no stage '{parts[0]}'; stages are {', '.join(map(str, stages))}{near}"


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
