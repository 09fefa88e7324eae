"""The help lists every command in a panel."""

import typer

from align.cli import PANELS, cli


def test_every_command_is_in_one_panel():
    listed = [name for names in PANELS.values() for name in names]
    assert len(listed) == len(set(listed))
    found = typer.main.get_command(cli).commands  # pyright: ignore[reportAttributeAccessIssue]
    shown = {name: command for name, command in found.items() if not command.hidden}
    assert {n: c.rich_help_panel for n, c in shown.items()} == {
        name: next(title for title, names in PANELS.items() if name in names) for name in shown
    }
