"""The commands at the start: ``align recipes``, ``align import`` and ``align init``."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from align.cli.options import MODEL_HELP, Runs
from align.core.errors import EXIT_USER, RecipeError
from align.core.text import visible

Force = Annotated[bool, typer.Option("--force", help="overwrite existing files")]


def recipes() -> None:
    """List the shipped recipes; run one by its name: align run NAME."""
    from align.recipe.source import shipped_recipes

    found = shipped_recipes()
    width = max(map(len, found))
    for name, description in found.items():
        typer.echo(f"{name:<{width}}  {description}")


def import_(
    tool: Annotated[
        Literal["axolotl", "llamafactory", "trl"],
        typer.Argument(
            metavar="axolotl|llamafactory|trl", help="tool that the configuration belongs to"
        ),
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


def init(
    model: Annotated[str | None, typer.Option(metavar="MODEL", help=MODEL_HELP)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="PATH", help="file, folder, URL or hub id; repeatable"),
    ] = None,
    name: Annotated[str, typer.Option(help="name of the run, and of the file")] = "my-run",
    tuning: Annotated[
        Literal["full", "lora", "qlora"], typer.Option(help="which weights are trained")
    ] = "lora",
    out: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="file to write (default: <name>.yaml)")
    ] = None,
    force: Force = False,
    runs: Runs = Path("runs"),
) -> None:
    """Write a recipe for a model and data; the stages follow from the format of the rows."""
    from align.cli.proposal import propose
    from align.recipe.load import load_recipe

    model = model or _asked("--model", f"Model ({MODEL_HELP})")
    sources = data or _asked("--data", "Data (files or hub ids, separated by spaces)").split()
    target = out or Path(f"{name}.yaml")
    made = propose(model, sources, name=name, tuning=tuning, runs=runs)
    _write_new({target: made.text}, force)
    for line in made.found:
        typer.echo(visible(line))
    load_recipe(target, runs=runs)
    typer.echo(visible(f"{target}: written and valid"))
    typer.echo(visible(f"next, test it with the rows and the model: align check {target} --deep"))
    typer.echo(visible(f"then: align run {target}"))


def _asked(flag: str, question: str) -> str:
    """Return the reply to a question on a terminal.

    Raises:
        RecipeError: there is no terminal; names the flag.
    """
    if not sys.stdin.isatty():
        raise RecipeError(f"{flag} is missing; without a terminal there is nobody to ask")
    return str(typer.prompt(question)).strip()
