"""The commands that write a recipe: ``align import`` and ``align init``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from align.core.errors import EXIT_USER, RecipeError
from align.core.text import visible

Force = Annotated[bool, typer.Option("--force", help="overwrite existing files")]


def import_(
    tool: Annotated[
        Literal["axolotl", "llamafactory", "trl"],
        typer.Argument(metavar="axolotl|llamafactory|trl"),
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="its YAML or JSON configuration")],
    out: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="file to write (default: <name>.yaml)")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="sft, dpo, orpo, kto, reward, grpo or ppo, for TRL"),
    ] = None,
    force: Force = False,
) -> None:
    """Convert another tool's configuration to a recipe; keys without an equivalent are named."""
    from align.recipe.foreign.convert import convert
    from align.recipe.load import load_recipe

    made = convert(tool, file, method=method)
    target = out or Path(f"{made.name}.yaml")
    _write_new({target: made.text} | {target.parent / n: t for n, t in made.files.items()}, force)
    for note in made.notes:
        typer.echo(visible(note.line), err=True)
    lost = sum(note.lost for note in made.notes)
    typer.echo(visible(f"{target}: written, {lost} keys not converted"))
    try:
        load_recipe(target)
    except RecipeError as error:
        typer.echo(visible(f"{error}\nedit {target}, then: align check {target}"), err=True)
        raise typer.Exit(EXIT_USER) from error
    typer.echo(visible(f"{target}: valid. Check rows and model with: align check --deep {target}"))


def _write_new(files: dict[Path, str], force: bool) -> None:
    """Write files that do not exist yet.

    Raises:
        RecipeError: one exists and ``force`` is off, or cannot be written.
    """
    for path in files:
        if path.exists() and not force:
            raise RecipeError(f"{path}: exists already; choose another --out, or use --force")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{path}: cannot be written: {error.strerror}") from error
