"""``align check --deep``: print each stage's preflight card, then a summary."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import typer

from align.core.accelerator import has_gpu
from align.core.card import Card, Line, read_card, table
from align.core.caret import with_source
from align.core.errors import EXIT_FAILED, RecipeError
from align.core.extras import TRAINING, require
from align.core.text import suggest, visible
from align.pipeline.following import Tail
from align.pipeline.places import placed
from align.pipeline.planning import plan
from align.pipeline.processes import stage_env
from align.recipe.load import RECIPE_FILE, write_resolved
from align.recipe.schema import Recipe

POLL_S = 0.2


def deep_check(
    recipe: Recipe,
    *,
    run_dir: Path,
    only: str | None,
    show: Callable[[Card], None],
) -> tuple[int, str]:
    """Run the preflight checks of every stage with available inputs, in a separate process.

    Args:
        recipe: the recipe to check.
        run_dir: folder of the run; its finished stages are inputs. It is never written.
        only: check this stage only.
        show: called with each card as soon as it is available.

    Returns:
        The exit code, and the log if the process itself failed (otherwise empty).

    Raises:
        RecipeError: the recipe has no stage ``only``.
    """
    require("align check --deep", *TRAINING)
    names = list(recipe.stages)
    if only is not None and only not in names:
        raise RecipeError(f"no stage '{only}'; stages are {', '.join(names)}{suggest(only, names)}")
    done = [stage.name for stage in plan(recipe, run_dir) if stage.status == "done"]
    # The checks import torch and load models; a separate process keeps the command line light.
    with tempfile.TemporaryDirectory(prefix="align-cards-") as folder:
        cards, log = Path(folder) / "cards.jsonl", Path(folder) / "log.txt"
        argv = [sys.executable, "-u", "-m", "align.stages.tools.deep_check"]
        write_resolved(recipe, Path(folder) / RECIPE_FILE)
        argv += ["--resolved", f"{folder}/{RECIPE_FILE}", "--run-dir", str(run_dir)]
        argv += ["--cards", str(cards)]
        argv += [word for name in done for word in ("--done", name)]
        argv += ["--only", only] if only is not None else []
        env = stage_env(ranks=1, threads=None, on_gpu=has_gpu())
        with log.open("wb") as sink:
            process = subprocess.Popen(argv, env=env, stdout=sink, stderr=subprocess.STDOUT)
            code = _follow(process, Tail(cards), show)
        return code, log.read_text(errors="replace") if code == EXIT_FAILED else ""


def _follow(process: subprocess.Popen[bytes], cards: Tail, show: Callable[[Card], None]) -> int:
    code = None
    try:
        while code is None:
            try:
                code = process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                code = None
            # Also after the process has ended: the last cards arrive with the exit code.
            for row in cards.rows():
                show(read_card(row))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    # A negative code is a signal, such as the kernel's out-of-memory killer.
    return code if code >= 0 else EXIT_FAILED


def closing_line(cards: Sequence[Card]) -> str:
    """Return the summary line; stages that cannot be checked yet do not count as checked."""
    waiting = [c.stage for c in cards if any(line.verdict == "not yet" for line in c.lines)]
    failed = [c.stage for c in cards if c.failed]
    parts = [f"{len(cards) - len(waiting)} of {len(cards)} stages checked"]
    if failed:
        parts.append(f"failed: {', '.join(failed)}")
    if waiting:
        parts.append(f"not checkable yet: {', '.join(waiting)}")
    return "; ".join(parts)


def with_places(card: Card, recipe: Recipe, places: Mapping[str, str]) -> Card:
    """Return a card whose failed checks name and show the place in the recipe that is wrong."""

    def shown(line: Line) -> Line:
        if line.verdict != "fail":
            return line
        told = line.remedy.splitlines()
        found = placed(told, recipe=recipe, places=places, stage=card.stage)
        return replace(line, remedy="\n".join(with_source("\n".join(found))))

    return replace(card, lines=[shown(line) for line in card.lines])


def check_deeply(
    recipe: Recipe, places: Mapping[str, str], run_dir: Path, *, only: str | None
) -> None:
    """Run the deep check and exit with its exit code.

    Args:
        recipe: to check. places: dotted key to the place in its file (``Resolved.places``).
        run_dir: folder of the run. only: check this stage only.
    """
    cards: list[Card] = []

    def show(card: Card) -> None:
        cards.append(card)
        for line in table(with_places(card, recipe, places)):
            typer.echo(visible(line))

    code, log = deep_check(recipe, run_dir=run_dir, only=only, show=show)
    if log:
        typer.echo(visible(log), err=True)
    if cards:
        typer.echo(visible(closing_line(cards)))
    raise typer.Exit(code)
