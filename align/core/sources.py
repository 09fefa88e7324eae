"""User code: functions that a recipe names as ``FILE.py:NAME`` or ``MODULE:NAME``, and extensions.

The code is never imported here, so a recipe can be checked and planned without running it.
"""

import ast
import hashlib
import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

EXTENSIONS = "ALIGN_EXTENSIONS"
"""Environment variable with modules that register kinds, separated by commas."""
GROUP = "align.extensions"
"""Entry points of installed packages whose modules register kinds."""


def extensions() -> list[str]:
    """Return the modules that register kinds: of the environment variable, then of packages."""
    named = map(str.strip, os.environ.get(EXTENSIONS, "").split(","))
    return list(dict.fromkeys([*filter(None, named), *_installed()]))


@cache
def _installed() -> tuple[str, ...]:
    return tuple(sorted(point.module for point in entry_points(group=GROUP)))


def extension_hashes() -> dict[str, str]:
    """Return the sha256 of each extension's module file; the result of a stage depends on it."""
    return {name: _sha256(source_file(f"{name}:")) for name in extensions()}


def _sha256(file: Path | None) -> str:
    # A missing file gets its own hash; whoever imports it reports it.
    return hashlib.sha256(file.read_bytes()).hexdigest() if file else "missing"


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
    """Return the names that a module binds at its top level; None if it cannot be parsed."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return None
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += [alias.asname or alias.name for alias in node.names]
    return found


def with_source_hashes(value: object) -> Any:
    """Return a specification with the path of each ``kind: python`` replaced by its file's hash.

    The result of a stage depends on what the function does, not on where its file is.
    """
    if isinstance(value, Mapping):
        found = {name: with_source_hashes(inner) for name, inner in value.items()}
        if value.get("kind") == "python" and isinstance(path := value.get("path"), str):
            found["path"] = f"sha256:{_sha256(source_file(path))}:{path.rpartition(':')[2]}"
        return found
    if isinstance(value, list | tuple):
        return [with_source_hashes(inner) for inner in value]
    return value
