"""Read a recipe from Python data or from YAML text, with the same checks as from a file.

``write_short`` writes a recipe so that it can be read again.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from align.core.errors import RecipeError
from align.core.text import hidden, shown
from align.recipe.load import resolve
from align.recipe.schema import Recipe
from align.recipe.source import LIMITS, Key, Loader, Mark, Reader, Source, compose_recipe

FILE_ONLY = "extends"


def read_plain(given: Mapping[str, Any] | str, origin: str) -> Source:
    """Return the source of a recipe that is not in a file.

    Environment variables are replaced as in files; in Python data their values stay text.

    Args:
        given: the recipe as a mapping of plain values, or as YAML text.
        origin: what messages say in the place of a file's name.

    Raises:
        RecipeError: the text is not YAML, or not a mapping.
    """
    source = Source()
    if isinstance(given, str):
        _read_text(given, origin, source)
    else:
        source.data = _PlainReader(origin, source).plain(given, ())
    if FILE_ONLY in source.data:
        del source.data[FILE_ONLY]
        source.errors.append(
            f"{origin}: {FILE_ONLY}: is relative to a recipe's file, and this recipe has none; "
            "write it to a file, or merge the two in Python"
        )
    return source


def _read_text(text: str, origin: str, source: Source) -> None:
    try:
        node = compose_recipe(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{origin}: expected a mapping with the keys 'name' and 'stages'")
    source.data = Reader(origin, source).value(node, ())


class _PlainReader(Reader):
    """A converter from Python data to plain data that records marks and errors."""

    def plain(self, value: object, key: Key) -> Any:
        """Return a value as YAML could have written it; anything else is an error."""
        self.source.marks[key] = Mark(self.file)
        if len(key) > LIMITS.depth:
            self.problem(key[:3], f"nested more than {LIMITS.depth} deep")
            return None
        if isinstance(value, Mapping):
            names = [name for name in value if not isinstance(name, str)]
            if names:
                self.problem(key, f"found the key {shown(names[0])}; expected text")
            return {n: self.plain(v, (*key, n)) for n, v in value.items() if isinstance(n, str)}
        if isinstance(value, list | tuple):
            return [self.plain(item, (*key, i)) for i, item in enumerate(value)]
        if isinstance(value, str):
            return self.expanded(str(value), key)[0]
        if value is None or isinstance(value, bool):
            return value
        return self._number(value, key)

    def _number(self, value: object, key: Key) -> int | float | None:
        if not isinstance(value, int | float):
            kind = type(value).__name__
            self.problem(key, f"found a {kind}; expected text, a number, a list or a mapping")
        elif not (math.isfinite(value) and abs(value) < 2**63):
            self.problem(key, f"found {value}; expected a finite number below 2^63")
        else:
            return int(value) if isinstance(value, int) else float(value)
        return None


class _Dumper(yaml.SafeDumper):
    """A writer that quotes each text which the reader of recipes would read as something else."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = Loader.yaml_implicit_resolvers


def write_short(recipe: Recipe, path: Path) -> None:
    """Write a recipe with the keys that differ from their defaults; secrets become ``${NAME}``.

    Raises:
        RecipeError: the recipe cannot be read back from what would be written.
    """
    whole = recipe.model_dump(mode="json")
    short = recipe.model_dump(mode="json", exclude_defaults=True)
    # Where defaults depend on other keys (algorithm, tuning method), a stage needs all keys.
    again = _read_back(short, path)
    for name, stage in recipe.stages.items():
        if again is None or again.stages[name] != stage:
            short["stages"][name] = whole["stages"][name]
    if _read_back(short, path) != recipe:
        raise RecipeError(
            f"{path}: the recipe cannot be written, because a file or an environment variable that "
            "it names has changed"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_as_text(short), encoding="utf-8")


def _read_back(plain: Mapping[str, Any], path: Path) -> Recipe | None:
    try:
        return resolve(read_plain(_as_text(plain), str(path)), folder=Path()).recipe
    except RecipeError:
        return None


def _as_text(plain: Mapping[str, Any]) -> str:
    return yaml.dump(hidden(_escaped(plain)), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _escaped(value: object) -> Any:
    """Return a value whose texts keep each ``${`` when they are read."""
    if isinstance(value, dict):
        return {name: _escaped(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
