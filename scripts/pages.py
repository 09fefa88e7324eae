"""Write the generated pages docs/cli.md, docs/python-api.md and the tables of docs/import.md.

Usage: python scripts/pages.py
"""

import inspect
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from align.cli import cli
from align.cli.examples import EXAMPLES
from align.recipe.foreign.convert import markdown
from scripts.api_page import api_page

ROOT = Path(__file__).resolve().parents[1]
IMPORT_PAGE = ROOT / "docs" / "import.md"
API_PAGE = ROOT / "docs" / "python-api.md"
CLI_PAGE = ROOT / "docs" / "cli.md"
CLI_HEAD = """\
# Command line

`align` is the command of an installation; `python -m align` is the same. `-h` shows the help of a
command, and `align --version` the version. Exit codes are 0 (done), 1 (failed, or an expectation
is not met), 2 (an error that you can fix, reported in one line each) and 75 (stopped by a signal;
the same command resumes).

A **RECIPE** is a YAML file or the name of a shipped recipe (`quickstart`). A **MODEL** is
`RUN/STAGE`, the folder of a finished stage or of a transformers model, or a hub id.

`--set KEY=VALUE` changes a value of the recipe before it is checked; it can be repeated. The path
may begin with the name of a stage (`dpo.beta=0.05`) or its place (`stages.0.steps=10`), and an
index selects an item of a list (`sft.data.0.rows=64`). The value is YAML: `ppo.watch=null`,
`evaluate.expect={}`. The changed value is part of the stage's identity and appears in its
`recipe.yaml`; `align show` names `--set` as its origin.

**Shell completion:** `align --install-completion` installs it for bash, zsh, fish or PowerShell;
`--show-completion` prints it.

This page is generated: `python scripts/pages.py`.
"""


def import_page() -> str:
    """Return docs/import.md: its own text, and the tables of the converters."""
    text = IMPORT_PAGE.read_text(encoding="utf-8")
    own = text.partition("\n## ")[0].rstrip()
    return f"{own}\n\n{markdown()}"


def cli_page() -> str:
    """Return docs/cli.md: every command with its arguments and options."""
    lines = [CLI_HEAD]
    for name, command in _commands(typer.main.get_command(cli), "align"):
        lines += [f"## {name}", "", inspect.cleandoc(command.help or ""), ""]
        types = get_type_hints(command.callback)
        params = [p for p in command.params if p.name in types and not p.hidden]
        rows = [_row(parameter, types[parameter.name]) for parameter in params]
        if rows:
            lines += ["| argument or option | default | meaning |", "|---|---|---|", *rows, ""]
        lines += ["```sh", *EXAMPLES[name.removeprefix("align ")], "```", ""]
    return "\n".join(lines)


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every visible command with its whole name, in the order of the help."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _row(parameter: Any, annotation: Any) -> str:
    if parameter.param_type_name == "argument":
        names = parameter.metavar or parameter.name.upper()
    else:
        names = ", ".join(parameter.opts)
        if not parameter.is_flag:
            names += f" {parameter.metavar or _type(annotation)}"
    shown = "" if parameter.required else _default(parameter.default)
    return f"| `{_cell(names)}` | {shown} | {_cell(parameter.help or '')} |"


def _type(annotation: Any) -> str:
    """Return the placeholder for a value: its choices, or the sort of its type."""
    inside = [part for part in get_args(annotation) if part is not type(None)]
    if inside and isinstance(inside[0], str):
        return "|".join(inside)
    if inside:
        return _type(inside[0])
    if issubclass(annotation, Enum):
        return "|".join(member.value for member in annotation)
    return {int: "N", float: "X"}.get(annotation, "TEXT")


def _default(value: Any) -> str:
    if value is None or value is False or value == () or value == [] or callable(value):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write the pages."""
    IMPORT_PAGE.write_text(import_page(), encoding="utf-8")
    CLI_PAGE.write_text(cli_page(), encoding="utf-8")
    API_PAGE.write_text(api_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
