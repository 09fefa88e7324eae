"""Code that a recipe names by ``FILE.py:NAME`` or ``MODULE:NAME``: where it lies, and its hash.

Nothing here imports the code: a recipe is checked, and a plan made, without running it.
"""

import ast
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def source_file(path: str) -> Path | None:
    """Return the file of ``FILE.py:NAME`` or ``MODULE:NAME``, None where there is none."""
    place = path.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place) if Path(place).is_file() else None
    parts = place.split(".")
    for folder in (Path.cwd(), *map(Path, sys.path)):
        for file in (
            folder.joinpath(*parts).with_suffix(".py"),
            folder.joinpath(*parts, "__init__.py"),
        ):
            if file.is_file():
                return file
    return None


def source_names(file: Path) -> list[str] | None:
    """Return the names that a module binds at its top level, None where it does not parse."""
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


def with_source_hashes(value: Any) -> Any:
    """Return a specification with the path of each ``kind: python`` replaced by its file's hash.

    What decides a result is what the function does, not where its file lies.
    """
    if isinstance(value, Mapping):
        found = {name: with_source_hashes(inner) for name, inner in value.items()}
        if value.get("kind") == "python" and isinstance(path := value.get("path"), str):
            file = source_file(path)
            code = hashlib.sha256(file.read_bytes()).hexdigest() if file else "missing"
            found["path"] = f"sha256:{code}:{path.rpartition(':')[2]}"
        return found
    if isinstance(value, list | tuple):
        return [with_source_hashes(inner) for inner in value]
    return value
