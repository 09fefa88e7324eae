"""The help lists every command in a panel, and shows examples of each."""

import shlex
from collections.abc import Iterator
from typing import Any

import typer
from typer.testing import CliRunner

from align.cli import PANELS, cli
from align.cli.examples import EXAMPLES


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")
        elif not command.hidden:
            yield path + name, command


def test_every_command_is_in_one_panel():
    listed = [name for names in PANELS.values() for name in names]
    assert len(listed) == len(set(listed))
    found = typer.main.get_command(cli).commands  # pyright: ignore[reportAttributeAccessIssue]
    shown = {name: command for name, command in found.items() if not command.hidden}
    assert {n: c.rich_help_panel for n, c in shown.items()} == {
        name: next(title for title, names in PANELS.items() if name in names) for name in shown
    }


def test_the_help_of_every_command_has_examples_that_parse():
    found = dict(commands(typer.main.get_command(cli)))
    assert set(EXAMPLES) == set(found)
    for name, command in found.items():
        assert EXAMPLES[name], name
        for line in EXAMPLES[name]:
            assert line in command.epilog.split("\n\n")
            assert line.startswith(f"align {name}")
            words = shlex.split(line.removeprefix(f"align {name}"))
            assert not command.make_context(name, words).args  # raises on an unknown option


def test_every_argument_and_option_of_a_command_has_a_help_text():
    found = dict(commands(typer.main.get_command(cli)))
    lacking = [
        f"{name} {parameter.name}"
        for name, command in found.items()
        for parameter in command.params
        if not parameter.hidden and not parameter.help
    ]
    assert lacking == []


def test_a_flag_shows_no_value() -> None:
    text = CliRunner().invoke(cli, ["check", "--help"]).output
    assert "--deep" in text
    assert "--only" in text
    assert "bool" not in text
