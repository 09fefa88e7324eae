"""Custom code: import extensions of the suite, and check the functions that a recipe names."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from align.core.errors import RecipeError
from align.core.sources import (
    EXTENSIONS,
    GROUP,
    code_keys,
    extensions,
    source_file,
    source_names,
)
from align.core.text import suggest
from align.recipe.source import Key, Source


def import_extensions() -> None:
    """Import the extensions, which register the kinds that they define.

    Raises:
        RecipeError: a module cannot be imported.
    """
    for name in extensions():
        try:
            import_module(name)
        except ImportError as error:
            raise RecipeError(
                f"extension '{name}' cannot be imported: {error}; {EXTENSIONS} and entry points "
                f"of {GROUP} name modules on Python's path"
            ) from error


def place_own_code(source: Source, folder: Path) -> None:
    """Make the files of the user's functions absolute, relative to ``folder``; report problems."""
    for key, block in _blocks(source.data, ()):
        for name in code_keys(block):
            place, _, function = block[name].rpartition(":")
            if place.endswith(".py"):
                block[name] = f"{(folder / place).resolve()}:{function}"
            if problem := problem_of(block[name]):
                mark = source.marks.get((*key, name))
                where = f"{mark.at_value()}: " if mark else ""
                source.errors.append(f"{where}{'.'.join(map(str, (*key, name)))}: {problem}")


def problem_of(path: str) -> str | None:
    """Return why ``FILE.py:NAME`` or ``MODULE:NAME`` is not a function, or None."""
    place, _, name = path.rpartition(":")
    file = source_file(path)
    if file is None:
        where = "no such file" if place.endswith(".py") else "no such module on Python's path"
        return f"{place}: {where}; expected FILE.py:FUNCTION, from the recipe's folder"
    # Only parsed: importing it could run anything, in the process of the command line.
    names = source_names(file)
    if names is None:
        return f"{file} is not valid Python; run: python -m py_compile {file}"
    if name not in names:
        return f"{file} has no '{name}'{suggest(name, names)}"
    return None


def _blocks(value: object, key: Key) -> Iterator[tuple[Key, dict[str, Any]]]:
    if isinstance(value, dict):
        yield key, value
        for name, inner in value.items():
            if name != "args":  # those of a function are the user's own
                yield from _blocks(inner, (*key, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _blocks(inner, (*key, i))
