"""The command ``align reward test``: score correct responses, wrong ones and attacks."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.core.errors import EXIT_FAILED, EXIT_OK, RecipeError
from align.core.text import visible

if TYPE_CHECKING:
    from reward_models.base import RewardFunction

reward = typer.Typer(help="Test rewards before training.", no_args_is_help=True)


@reward.callback()
def _commands() -> None:
    """Test rewards before training."""
    # A callback keeps `test` a subcommand; typer would merge a single command into its group.


@reward.command("test")
def try_out(
    path: Annotated[
        str, typer.Argument(metavar="REWARD", help="FILE.py:FUNCTION, MODULE:FUNCTION, or a kind")
    ],
    data: Annotated[Path, typer.Option(metavar="FILE", help="rows with prompt and answer")],
    args: Annotated[
        str, typer.Option(metavar="JSON", help="arguments of the function, or keys of the kind")
    ] = "{}",
    rows: Annotated[int, typer.Option(min=2, help="number of rows to score")] = 16,
    deadline: Annotated[
        float, typer.Option(min=0.1, help="time limit per call of a function (s)")
    ] = 30.0,
) -> None:
    """Score correct responses, wrong ones and attacks; exit code 1 if an attack succeeds."""
    from align.data.load import load_examples
    from align.recipe.schema import DataSpec
    from reward_models.base import MissingColumnError
    from reward_models.trial import try_reward, weaknesses

    # Load the rows and the reward function.
    examples = load_examples([DataSpec(path=str(data))], kind="prompts", seed=0)[:rows]
    names = sorted({name for example in examples for name in example.columns})
    columns: dict[str, Any] = {n: [e.columns.get(n) for e in examples] for n in names}
    built = _built(path, args, deadline)
    try:
        outcomes = try_reward(built, [example.prompt for example in examples], columns)
    except (MissingColumnError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error
    # Print one line per kind of response, then the weaknesses.
    typer.echo(visible(f"{path} on {len(examples)} rows of {data}"))
    for outcome in outcomes:
        shown = " ".join("-" if s is None else f"{s:.3g}" for s in outcome.scores[:8])
        mean = "none" if outcome.mean is None else f"{outcome.mean:.3f}"
        typer.echo(f"  {outcome.response.name:24s} mean {mean:>8s}   {shown}")
    for reason, count in built.invalid.most_common():
        typer.echo(visible(f"  no score: {count} x {reason}"))
    found = weaknesses(outcomes)
    for line in found:
        typer.echo(visible(f"weak: {line}"))
    typer.echo("no attack pays" if not found else f"{len(found)} weaknesses")
    raise typer.Exit(EXIT_FAILED if found else EXIT_OK)


def _built(path: str, args: str, deadline_s: float) -> "RewardFunction":
    from align.recipe.own_code import problem_of
    from reward_models import build_reward

    if ":" in path and (problem := problem_of(path)):
        raise RecipeError(problem)
    try:
        given = json.loads(args)
        if ":" not in path:
            return build_reward({**given, "kind": path})
        spec = {"kind": "python", "path": path, "args": given, "deadline_s": deadline_s}
        return build_reward(spec)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{path}: {error}") from error
