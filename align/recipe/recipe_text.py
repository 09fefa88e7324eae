"""Read the text of a recipe file, and describe a file that is not a recipe."""

import re
from pathlib import Path

import yaml

from align.core.errors import RecipeError

_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""First bytes of a text in another encoding."""
_BLANKS = {"\u00a0": "a non-breaking space", "\u3000": "an ideographic space"}
_QUOTES = re.compile("^[\u2018\u2019\u201c\u201d\u201e]")


def read_text(path: Path, *, limit: int) -> str:
    """Return the text of a recipe file; at most ``limit`` characters are read, and one more.

    Raises:
        FileNotFoundError: there is no such file.
        RecipeError: it is a folder, cannot be read, or is not UTF-8 text.
    """
    if path.is_dir():
        run = any(path.glob("*/recipe.yaml"))
        told = f"a folder of runs; its results: align show {path}" if run else "a folder"
        raise RecipeError(f"{path}: {told}. Expected a recipe, which is a YAML file")
    # Read at most the limit: the path may be a device or a huge file.
    try:
        with path.open("rb") as f:
            data = f.read(limit * 4 + 1)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise RecipeError(f"{path}: cannot be read: {e.strerror}") from e
    name = _MARKS.get(data[:2])
    if name:
        raise RecipeError(f"{path}: {name} text; save it as UTF-8")
    at = data.find(b"\0")
    if at >= 0:
        raise RecipeError(f"{path}: a binary file (byte {at} is 0); expected YAML text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        before = data[: e.start]
        line, column = before.count(b"\n") + 1, e.start - before.rfind(b"\n")
        told = f"byte 0x{data[e.start]:02x} is not UTF-8; save the file as UTF-8"
        raise RecipeError(f"{path}:{line}:{column}: {told}") from None


def not_a_recipe(path: Path, node: yaml.Node | None) -> str:
    """Return a description of a YAML file whose top level is not a mapping."""
    expected = "expected a mapping with the keys 'name' and 'stages'"
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value):
        return f"{path}: the file is empty; {expected}. align init writes one"
    at = node.start_mark
    found = "a list" if isinstance(node, yaml.SequenceNode) else "text"
    return f"{path}:{at.line + 1}:{at.column + 1}: found {found}; {expected}"


def foreign_file(path: Path, text: str) -> str | None:
    """Return what to do with a file that is recognized as something else than YAML, or None."""
    start = text.lstrip("\ufeff \t\r\n")
    if path.suffix in (".jsonl", ".ndjson") or re.match(r"\{.*\}[ \t\r]*\n\s*\{", start):
        return f"{path}: data, not a recipe; write one for it: align init --data {path}"
    if path.suffix == ".py" or re.match(r"(?:import|from) \w+|#!.*python", start):
        return f"{path}: a Python script; run it with python {path}, or write a recipe in YAML"
    if "\n```" in "\n" + text:
        return f"{path}: a Markdown page; save the YAML between its ``` lines as a file of its own"
    return None


def odd_characters(name: str) -> str:
    """Return what is odd about a key or value that looks right: other blanks, curly quotes."""
    for blank, what in _BLANKS.items():
        if blank in name:
            return f"; it contains {what} (U+{ord(blank):04X}): write ordinary spaces"
    if _QUOTES.match(name):
        return "; it begins with a typographic quote: write ' or \""
    return ""
