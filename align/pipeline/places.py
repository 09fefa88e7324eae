"""Find the place in a recipe that an error of a stage's process is about.

The process reads a resolved copy of the recipe, so its errors name only the key. Worked example:
``tuning.targets: no layer 'q'`` of the stage ``sft`` becomes ``my.yaml:9:14:
stages.sft.tuning.targets: no layer 'q'``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from align.recipe.schema import Recipe

_KEY = re.compile(r"(?P<key>[a-z]\w*(?:\.\w+)*)(?P<more>(?:, [\w.]+)*)(?P<value> [^\s:]+)?: ")


def placed(
    lines: Sequence[str], *, recipe: Recipe, places: Mapping[str, str], stage: str
) -> list[str]:
    """Return the lines of a message, with the place in front of each that is about a key.

    Args:
        lines: what the process said. recipe: the recipe. stage: the stage that said it.
        places: dotted key to the place in the recipe's file (``Resolved.places``).
    """
    found = []
    for line in lines:
        key, text = _key_of(line, recipe, stage)
        place = next((places[k] for k in _upwards(key, stage) if k in places), None)
        found.append(line if place is None else f"{place}: {key}: {text}")
    return found


def _key_of(line: str, recipe: Recipe, stage: str) -> tuple[str, str]:
    """Return the dotted key that a line is about (empty if unknown), and the rest of the line."""
    spec = recipe.stages[stage].model_dump(mode="json")
    if match := _KEY.match(line):
        key, rest = match["key"], line[match.end() :]
        text = f"{match['value'].strip()}: {rest}" if match["value"] else rest
        text = line if match["more"] else text
        if _has(spec, key):
            return f"stages.{stage}.{key}", text
        if _has(recipe.model_dump(mode="json", exclude={"stages"}), key):
            return key, text
        if key == stage and not match["value"]:
            return f"stages.{stage}", rest
    # Messages about a file or a function begin with what the recipe calls it.
    named = [(v, k) for k, v in _texts(spec) if re.match(re.escape(v) + r"[:/,]", line)]
    return (f"stages.{stage}.{max(named)[1]}" if named else ""), line


def _has(data: object, key: str) -> bool:
    """Return whether plain data has a dotted key."""
    for part in key.split("."):
        if isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        elif isinstance(data, dict) and part in data:
            data = data[part]
        else:
            return False
    return True


def _texts(data: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the value of each text that may be a path or a function."""
    if isinstance(data, str) and re.search(r"[./:]", data):
        yield key, data
    listed = dict(enumerate(data)) if isinstance(data, list) else data
    items = listed.items() if isinstance(listed, dict) else ()
    for name, value in items:
        yield from _texts(value, f"{key}.{name}" if key else str(name))


def _upwards(key: str, stage: str) -> Iterator[str]:
    """Yield a key and those around it, up to that of the stage."""
    while key:
        yield key
        if key == f"stages.{stage}":
            return
        key = key.rpartition(".")[0]
