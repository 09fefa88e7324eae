"""User code: functions that a recipe names as ``FILE.py:NAME`` or ``MODULE:NAME``, and extensions.

The code is never imported here, so a recipe can be checked and planned without running it.
"""

import ast
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

EXTENSIONS = "ALIGN_EXTENSIONS"
"""Environment variable with modules that register kinds, separated by commas."""
GROUP = "align.extensions"
"""Entry points of installed packages whose modules register kinds."""
FUNCTION_KEYS = ("map", "estimator", "objective", "loss")
"""Keys of a recipe whose value is a function of the user if it has the form of one.

A ``path`` is one in a block of ``kind: python``.
"""


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def extensions() -> list[str]:
    """Return the modules that register kinds: of the environment variable, then of packages."""
    named = map(str.strip, os.environ.get(EXTENSIONS, "").split(","))
    return list(dict.fromkeys([*filter(None, named), *installed_extensions()]))


@cache
def installed_extensions() -> Mapping[str, str]:
    """Return the modules that installed packages name, each with the name of its package."""
    points = sorted(entry_points(group=GROUP), key=lambda point: point.module)
    return {point.module: point.dist.name if point.dist else "" for point in points}


def extension_hashes() -> dict[str, str]:
    """Return the hash of each extension's source; the result of a stage depends on it."""
    return {name: source_hash(f"{name}:") for name in extensions()}


def source_hash(path: str) -> str:
    """Return the sha256 of ``FILE.py:NAME`` or ``MODULE:NAME`` and of the modules it imports.

    These are the modules beside it and below, by the names that appear in the code. Names that are
    put together at run time, installed packages and files of data do not count.
    """
    file = source_file(path)
    if file is None:
        return "missing"  # whoever imports it reports it
    root, inside = _root(file, path.rpartition(":")[0])
    found, waiting = {file: ""}, [file]
    while waiting:
        for module in _imported(waiting.pop(), root):
            if module not in found and module.is_relative_to(inside):
                found[module] = str(module.relative_to(root))
                waiting.append(module)
    digest = hashlib.sha256()
    for module, name in sorted(found.items(), key=lambda item: item[1]):
        digest.update(f"{name} {hashlib.sha256(module.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _root(file: Path, place: str) -> tuple[Path, Path]:
    """Return the folder from which the module of a file is imported, and that of its own code."""
    if place.endswith(".py"):
        return file.parent, file.parent
    parts = place.split(".")
    root = file.parents[len(parts) - (file.name != "__init__.py")]
    # Of the packages that are installed beside it, only its own.
    return root, root / parts[0] if root.name in ("site-packages", "dist-packages") else root


def _imported(file: Path, root: Path) -> Iterator[Path]:
    """Yield the files below ``root`` that a module imports by name."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    package = file.parent.relative_to(root).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # One dot is the module's own package, each further one a package above it.
            outer = list(package[: len(package) - node.level + 1]) if node.level else []
            of = [*outer, *(node.module.split(".") if node.module else ())]
            # What is imported from a package may itself be a module.
            names = [of, *([*of, alias.name] for alias in node.names)]
        else:
            continue
        for parts in names:
            yield from _modules(root, parts)


def _modules(root: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the files that an import of a dotted name runs: the packages and the module."""
    for i in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:i])
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file():
                yield file
                break


def source_file(path: str) -> Path | None:
    """Return the file of ``FILE.py:NAME`` or ``MODULE:NAME``, or None."""
    place = path.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place) if Path(place).is_file() else None
    parts = place.split(".")
    # The same order as an import in the stage's process, without running any code.
    for folder in (Path.cwd(), *map(Path, sys.path)):
        for file in (
            folder.joinpath(*parts).with_suffix(".py"),
            folder.joinpath(*parts, "__init__.py"),
        ):
            if file.is_file():
                return file
    return None


def source_names(file: Path) -> list[str] | None:
    """Return the names that a module binds at its top level; None if it cannot be parsed.

    ``*`` is among them if the module imports all names of another one.
    """
    try:
        waiting: list[ast.AST] = [ast.parse(file.read_bytes())]
    except (SyntaxError, ValueError):
        return None
    found: list[str] = []
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            # What is inside of it are its own names, except those that it declares global.
            found.append(node.name)
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Global)]
            found += [name for declared in inside for name in declared.names]
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += [alias.asname or alias.name for alias in node.names]
        waiting += ast.iter_child_nodes(node)
    return found


def methods_of(file: Path, name: str) -> list[str]:
    """Return ``CLASS.NAME`` for each class at the top level of a module with a method ``name``."""
    return [
        f"{node.name}.{name}"
        for node in ast.parse(file.read_bytes()).body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(part, _FUNCTIONS) and part.name == name for part in node.body)
    ]


def parameters_of(path: str) -> list[str] | None:
    """Return the names of a function's parameters, which is not run; None if it is not found.

    Any further keyword arguments (``**options``) are the last name, ``**``.
    """
    file = source_file(path)
    try:
        tree = ast.parse(file.read_bytes()) if file else None
    except (SyntaxError, ValueError):
        return None
    name = path.rpartition(":")[2]
    for node in tree.body if tree else ():
        if isinstance(node, _FUNCTIONS) and node.name == name:
            named = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            return [*(arg.arg for arg in named), *(["**"] if node.args.kwarg else [])]
    return None


def code_keys(block: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of a mapping whose value names a function of the user."""
    for key in ("path",) if block.get("kind") == "python" else FUNCTION_KEYS:
        if isinstance(value := block.get(key), str) and ":" in value:
            yield key


def with_source_hashes(value: object) -> Any:
    """Return a specification in which each function of the user is replaced by its source's hash.

    The result of a stage depends on what the function does, not on where its file is.
    """
    if isinstance(value, Mapping):
        # The arguments of a function are the user's own.
        found = {n: x if n == "args" else with_source_hashes(x) for n, x in value.items()}
        for key in code_keys(value):
            found[key] = f"sha256:{source_hash(value[key])}:{value[key].rpartition(':')[2]}"
        return found
    if isinstance(value, list | tuple):
        return [with_source_hashes(inner) for inner in value]
    return value
