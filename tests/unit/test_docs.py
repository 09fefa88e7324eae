"""What the docs show is what the suite takes: recipes, commands, keys, messages and links."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from align.cli import cli
from align.recipe import reference
from align.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
PARTS = re.S | re.M
PAGES = [
    ROOT / "README.md",
    ROOT / "AGENTS.md",
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(language: str) -> list[tuple[str, str]]:
    """Return (place, text) of every fenced block of a language in the docs."""
    return [
        (f"{page.relative_to(ROOT)}, block {i + 1}", text)
        for page in PAGES
        for i, text in enumerate(
            re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), PARTS)
        )
    ]


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def properties_of(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for inner in schema.values():
            yield from properties_of(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from properties_of(inner)


@pytest.mark.parametrize(("place", "text"), blocks("yaml"))
def test_every_recipe_in_the_docs_is_valid(place: str, text: str, tmp_path: Path) -> None:
    found = yaml.safe_load(text)
    if isinstance(found, dict) and {"name", "stages"} <= set(found):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        # A reward of the page's own lies beside the recipe.
        for name, code in re.findall(
            r"^```python\n# (\w+\.py)\b.*?\n(.*?)^```", _page(place), PARTS
        ):
            (tmp_path / name).write_text(code, encoding="utf-8")
        assert load_recipe(path, ()).stages
        return
    # A part of a recipe. The names of stages and of columns are free.
    free = {"prompt", "completion"} if isinstance(found, list) else set()
    for mapping in _mappings(found):
        free |= {k for k, v in mapping.items() if isinstance(v, dict) and "kind" in v}
        free |= set(keys_of([mapping.get("args", {}), mapping.get("rename", {})]))
    unknown = set(keys_of(found)) - set(properties_of(reference.json_schema())) - free
    assert not unknown, f"{place}: no key of a recipe: {sorted(unknown)}"


def _page(place: str) -> str:
    return (ROOT / place.partition(",")[0]).read_text(encoding="utf-8")


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _mappings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _mappings(inner)


def commands() -> list[tuple[str, str]]:
    """Return (place, command) of every line of the docs' shell blocks that calls align."""
    found = []
    for place, text in blocks("sh"):
        joined = text.replace("\\\n", " ")
        for line in joined.splitlines():
            words = line.partition(" #")[0].split("|")[-1].strip()
            words = re.sub(r"^(?:\w+=\S+ )+", "", words)
            if words.startswith("align "):
                found.append((place, words))
    return found


@pytest.mark.parametrize(("place", "command"), commands())
def test_every_command_in_the_docs_parses(place: str, command: str) -> None:
    at, words = get_command(cli), shlex.split(command)[1:]
    # Down the groups (align data check ...), then the options of the command itself.
    while hasattr(at, "commands") and words and not words[0].startswith("-"):
        assert words[0] in at.commands, f"{place}: {command}"
        at = at.commands[words.pop(0)]
    if {"-h", "--help", "--version"} & set(words):
        return
    context = at.make_context("align", words)  # raises on an unknown option or argument
    assert not context.args, place


def test_the_docs_have_commands_and_recipes() -> None:
    assert len(commands()) >= 30
    assert sum("stages:" in text for _, text in blocks("yaml")) >= 4


def source_texts() -> str:
    """Return every string of the code on a line of its own; ``…`` where a value is inserted."""
    found = []
    for path in [*(ROOT / "align").rglob("*.py"), *(ROOT / "reward_models").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", text, re.M)
    assert len(messages) >= 15
    known = source_texts()
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("…"))):
            assert part in known, f"no message of the code has {part!r}"


def test_links_of_the_index_for_language_models_exist() -> None:
    text = (ROOT / "llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 15
    for link in links:
        assert (ROOT / link).is_file(), link


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: it is part of the extra test")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "recipe-keys" / "index.html").is_file()
    # Nothing is requested from another host.
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk)[^"]*\.(?:js|css|woff2?)"', home)
