"""The page docs/python-api.md: signatures and docstrings of what ``import align`` offers."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import align

HEAD = """\
# Python API

Signatures and docstrings of everything that `import align` offers. [Python](python.md) shows how to
use it, with examples that run. `**keys` of a function are the keys of its stage in
[recipe keys](recipe-keys.md).

This page is generated: `python scripts/pages.py`. It is plain Markdown, so it can be read in the
repository and by agents without building the site.
"""
TRAIN = ("sft", "dpo", "kto", "reward", "grpo", "ppo")
RECIPES = ("evaluate", "run", "load_recipe")
ERRORS = ("AlignError", "RunError")
REWARDS = """\
## Rewards

`align.rewards.NAME(...)` makes the settings of a reward; its arguments are the keys of that kind
under [rewards](recipe-keys.md#rewards). `align.rewards.build(settings)` returns the function
`f(prompts=..., completions=..., **columns)`, for scoring without a run.

The kinds are {kinds}.
"""
SECTION = re.compile(
    r"^(Args|Attributes|Raises|Returns|Yields|Reference):\n((?:[ ]{4}.*\n|\n)+)", re.M
)
ENTRY = re.compile(r"^    (\S[^:\n]*): ((?:.*\n)(?:     .*\n)*)", re.M)
WIDTH = 100
"""Columns of a signature on one line."""


def api_page() -> str:
    """Return docs/python-api.md."""
    parts = [HEAD, "## Train\n", *(_function(f"align.{name}") for name in TRAIN)]
    parts += ["## Recipes and evaluation\n", *(_function(f"align.{name}") for name in RECIPES)]
    parts += ["## Run\n", _text(align.Run), *_members(align.Run)]
    kinds = [f"`{n}`" for n in align.rewards.__all__ if n not in ("RewardSpec", "build")]
    parts.append(REWARDS.format(kinds=", ".join(kinds)))
    parts += ["## Losses\n", "Pure functions and result types on tensors, in `align.losses`.\n"]
    parts += [_function(f"align.losses.{name}") for name in align.losses.__all__]
    parts.append("## Errors\n")
    for name in ERRORS:
        parts += [f"### align.{name}\n", _text(getattr(align, name))]
    return "\n".join(parts)


def _function(path: str) -> str:
    """Return the signature and the docstring of a function or class by its whole name."""
    found: Any = align
    for part in path.split(".")[1:]:
        found = getattr(found, part)
    if not callable(found):
        return f"### {path}\n\n`{found!r}`\n"
    return f"### {path}\n\n{_signature(path.rpartition('.')[2], found)}\n{_text(found)}"


def _members(kind: type) -> Iterator[str]:
    """Yield the public methods and properties of a class, in the order of its source."""
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"### Run.{name}\n\n{_text(member)}"
        elif callable(member):
            yield f"### Run.{name}\n\n{_signature(name, member)}\n{_text(member)}"


def _signature(name: str, found: Callable[..., Any]) -> str:
    """Return a signature as a code block; types are named without their modules."""
    signature = inspect.signature(found)
    parts, keyword = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            keyword = True
            parts.append("*")
        if parameter.name != "self":
            parts.append(_parameter(parameter))
    given = signature.return_annotation
    result = "" if given in (None, "None", signature.empty) else f" -> {_type(given)}"
    text = f"{name}({', '.join(parts)}){result}"
    if len(text) > WIDTH:
        lines = "".join(f"    {part},\n" for part in parts)
        text = f"{name}(\n{lines}){result}"
    return f"```python\n{text}\n```\n"


def _parameter(given: inspect.Parameter) -> str:
    stars = {given.VAR_POSITIONAL: "*", given.VAR_KEYWORD: "**"}.get(given.kind, "")
    text = f"{stars}{given.name}: {_type(given.annotation)}"
    if given.default is given.empty:
        return text
    default = f'"{given.default}"' if isinstance(given.default, str | Path) else given.default
    return f"{text} = {default}"


def _type(annotation: Any) -> str:
    # Quoted where its names are imported for type checkers only.
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text).replace("'", "")


def _text(found: Any) -> str:
    """Return a docstring as Markdown: its sections become lists."""
    text = (inspect.getdoc(found) or "") + "\n"
    text = SECTION.sub(lambda m: f"**{m[1]}:**\n\n{_entries(m[1], m[2])}\n", text)
    return text.replace("``", "`").rstrip() + "\n"


def _entries(title: str, block: str) -> str:
    entries = [] if title in ("Returns", "Reference") else ENTRY.findall(block)
    if not entries:
        return inspect.cleandoc(block) + "\n"
    return "".join(f"- `{name}`: {' '.join(meaning.split())}\n" for name, meaning in entries)
