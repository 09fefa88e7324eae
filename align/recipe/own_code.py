"""Custom code: import extensions of the suite, and check the functions that a recipe names."""

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from align.core.errors import RecipeError
from align.core.sources import (
    EXTENSIONS,
    code_keys,
    extensions,
    installed_extensions,
    methods_of,
    parameters_of,
    source_file,
    source_names,
)
from align.core.text import suggest, unexpanded
from align.recipe.source import Key, Source


def import_extensions() -> None:
    """Import the extensions, which register the kinds that they define.

    Raises:
        RecipeError: a module cannot be imported.
    """
    for name in extensions():
        try:
            import_module(name)
        # A module may raise anything; a mistake in one must name it, as it concerns every recipe.
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            if package := installed_extensions().get(name):
                raise RecipeError(
                    f"extension '{name}' of the installed package '{package}' cannot be imported: "
                    f"{reason}. Install what it needs, or remove it: pip uninstall {package}"
                ) from error
            raise RecipeError(
                f"extension '{name}' cannot be imported: {reason}; {EXTENSIONS} names modules on "
                "Python's path"
            ) from error


def place_own_code(source: Source, folder: Path) -> None:
    """Make the files of the user's functions absolute, relative to ``folder``; report problems."""
    for key, block in _blocks(source.data, ()):
        for name in code_keys(block):
            written = block[name]
            block[name] = placed(written, folder)
            if problem := problem_of(block[name]):
                problem += _hint_here(written, folder) if source_file(block[name]) is None else ""
                mark = source.marks.get((*key, name))
                where = f"{mark.at_value()}: " if mark else ""
                source.errors.append(f"{where}{'.'.join(map(str, (*key, name)))}: {problem}")


def placed(path: str, folder: Path) -> str:
    """Return ``FILE.py:NAME`` with the file relative to ``folder``; a module stays as it is."""
    place, _, function = path.rpartition(":")
    file = (folder / place).resolve()
    # A path with a variable that nothing expands stays as it was written, for the message.
    known = place.endswith(".py") and (file.is_file() or not unexpanded(place))
    return f"{file}:{function}" if known else path


def _hint_here(path: str, folder: Path) -> str:
    """Return what to write for a file that is in the current folder but not beside the recipe."""
    place, _, function = path.rpartition(":")
    if not place.endswith(".py") or not Path(place).is_file():
        return ""
    return f"; it is in the current folder: write {os.path.relpath(place, folder)}:{function}"


def problem_of(path: str) -> str | None:
    """Return why ``FILE.py:NAME`` or ``MODULE:NAME`` is not a function, or None."""
    place, _, name = path.rpartition(":")
    file = source_file(path)
    if file is None:
        where = "no such file" if place.endswith(".py") else "no such module on Python's path"
        return (
            f"{place}: {where}; expected FILE.py:FUNCTION, from the recipe's folder"
            f"{unexpanded(place)}"
        )
    # Only parsed: importing it could run anything, in the process of the command line.
    names = source_names(file)
    if names is None:
        return f"{file} is not valid Python; run: python -m py_compile {file}"
    if name in names or ("*" in names and name.isidentifier()):
        return None
    short = name.rpartition(".")[2]
    if method := name if "." in name else next(iter(methods_of(file, name)), None):
        return (
            f"{method} is a part of a class in {file}; expected a function of the module. Add one "
            f"that calls it (or, for a static method, {short} = {method}) and name it ...:{short}"
        )
    return f"{file} has no '{name}'{suggest(name, names)}"


def no_judge(path: str) -> str | None:
    """Return why a function cannot judge pairs, or None if it can or cannot be read."""
    names = parameters_of(path)
    if names is None or {"others", "**"} & set(names):
        return None
    return (
        f"'{path.rpartition(':')[2]}' has no parameter 'others', the responses that it compares "
        f"with; found {', '.join(names) or 'none'}. A function that scores one response is a "
        "reward, for 'judge' of the stage or task"
    )


def _blocks(value: object, key: Key) -> Iterator[tuple[Key, dict[str, Any]]]:
    if isinstance(value, dict):
        yield key, value
        for name, inner in value.items():
            if name != "args":  # those of a function are the user's own
                yield from _blocks(inner, (*key, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _blocks(inner, (*key, i))
