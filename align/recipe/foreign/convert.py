"""Convert configurations of axolotl, LLaMA-Factory and TRL to recipes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.core.errors import RecipeError
from align.recipe.foreign import axolotl, llamafactory, trl
from align.recipe.foreign.keys import Keys, Note
from align.recipe.reference import SCHEMA_FILE
from align.recipe.source import parse_file

TOOLS = {"axolotl": axolotl, "llamafactory": llamafactory, "trl": trl}
"""The converters, by the name that ``align import`` takes."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A recipe made from another tool's configuration.

    Attributes:
        name: name of the run.
        text: the recipe as YAML.
        notes: every key that has no exact equivalent.
        files: further files that belong beside the recipe, by name.
    """

    name: str
    text: str
    notes: list[Note]
    files: Mapping[str, str] = field(default_factory=dict)


def convert(tool: str, path: Path, *, method: str | None = None) -> Converted:
    """Convert a configuration.

    Args:
        tool: one of ``TOOLS``.
        path: its YAML or JSON file.
        method: the trainer, for tools whose configuration does not name it.

    Raises:
        RecipeError: the file is not YAML, or cannot be converted at all.
    """
    source = parse_file(path)
    if "stages" in source.data:
        raise RecipeError(f"{path}: this is a recipe already: align check {path}")
    if source.errors:
        raise RecipeError("\n".join(source.errors))
    notes: list[Note] = []
    keys = Keys(source.data, source.marks, at=(), notes=notes)
    draft = TOOLS[tool].convert(keys, method)
    recipe = draft.whole()
    # The same key may be read at several places.
    notes = sorted(
        dict.fromkeys(notes), key=lambda n: (not n.lost, int(n.place.rpartition(":")[2]))
    )
    return Converted(
        recipe["name"], recipe_text(recipe, path, tool=tool, notes=notes), notes, draft.files
    )


def recipe_text(recipe: Mapping[str, Any], path: Path, *, tool: str, notes: list[Note]) -> str:
    """Return a converted recipe as YAML, with the notes as comments."""
    head = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# Converted from {path.name} by: align import {tool} {path.name}",
    ]
    for lost, title in ((True, "Not converted:"), (False, "Different, or not needed:")):
        lines = [note for note in notes if note.lost is lost]
        if lines:
            head.append(f"# {title}")
        for note in lines:
            line = note.place.rpartition(":")[2]
            # A quoted key may have several lines, which would leave the comment.
            told = " ".join(f"{note.key}: {note.what}".split())
            head.append(f"#   line {line}: {told}")
    body = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(head) + "\n" + body


def markdown() -> str:
    """Return the tables of docs/import.md: equivalents and reasons, tool by tool."""
    lines = []
    for module in TOOLS.values():
        lines += [f"## {module.TOOL}", "", "| key | in a recipe |", "|---|---|"]
        lines += [f"| {_code(keys)} | {own} |" for keys, own in module.EQUIVALENTS.items()]
        lines += ["", "Keys without an equivalent:", "", "| key | reason |", "|---|---|"]
        for name, reason in sorted(module.REASONS.items()):
            if module is llamafactory and trl.REASONS.get(name) == reason:
                continue
            lines.append(f"| {_code(name)} | {reason.removeprefix('-').strip()} |")
        lines.append("")
    return "\n".join(lines)


def _code(keys: str) -> str:
    return ", ".join(f"`{key}`" for key in keys.split(", "))
