"""``align check --deep``: print the card of each stage as it comes, then what was left open."""

from collections.abc import Sequence
from pathlib import Path

import typer

from align.core.card import Card, table
from align.pipeline.deep import closing_line, deep_check


def check_deeply(recipe: Path, overrides: Sequence[str], run_dir: Path, only: str | None) -> None:
    """Run the deep check and end with its exit code."""
    cards: list[Card] = []

    def show(card: Card) -> None:
        cards.append(card)
        for line in table(card):
            typer.echo(line)

    code, log = deep_check(recipe, overrides=overrides, run_dir=run_dir, only=only, show=show)
    if log:
        typer.echo(log, err=True)
    if cards:
        typer.echo(closing_line(cards))
    raise typer.Exit(code)
