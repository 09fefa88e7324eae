"""Run recipes from Python, by the same stages in the same processes as ``align run``."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.api.given import Writer
from align.api.result import Run
from align.core.errors import EXIT_OK, EXIT_PREEMPTED, Preempted, RecipeError, RunError
from align.pipeline.following import LOG_LINE
from align.pipeline.progress import make_console
from align.pipeline.running import Signals
from align.pipeline.running import run as run_recipe
from align.pipeline.selection import NothingChanged
from align.pipeline.terminal import Terminal
from align.recipe.load import Resolved, load_resolved, resolve
from align.recipe.plain import read_plain
from align.recipe.schema import Recipe
from align.report.results import expectation_lines

RUNS = Path("runs")


def load_recipe(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    overrides: Sequence[str] = (),
    *,
    runs: Path | str = RUNS,
) -> Recipe:
    """Return a valid recipe with all defaults filled in.

    Args:
        recipe: a file, the name of a shipped recipe, YAML text of several lines, or plain data.
        overrides: ``stages.sft.epochs=2`` texts, as after ``--set``.
        runs: folder in which RUN/STAGE is looked up.

    Raises:
        RecipeError: lists all errors, one line each.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("overrides: this recipe is loaded already; give them when loading it")
        return recipe
    return _resolved(recipe, overrides, runs=Path(runs)).recipe


def _resolved(
    recipe: Mapping[str, Any] | Path | str, overrides: Sequence[str], *, runs: Path
) -> Resolved:
    """Return a valid recipe with the places of its values."""
    if isinstance(recipe, Mapping) or (isinstance(recipe, str) and "\n" in recipe):
        source = read_plain(recipe, "recipe")
        return resolve(source, overrides, folder=Path(), runs=runs)
    return load_resolved(recipe, overrides, runs=runs)


def run(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    out: Path | str | None = None,
    overrides: Sequence[str] = (),
    force: bool = False,
    only: str | Sequence[str] | None = None,
    from_: str | None = None,
    until: str | None = None,
    runs: Path | str = RUNS,
    quiet: bool = False,
) -> Run:
    """Run the stages of a recipe that are not done; the same call again resumes.

    Args:
        recipe: as for ``load_recipe``. Plain data may also contain what the functions of the
            stages accept: datasets and rows as ``path``, functions as rewards, runs as models.
        out: folder of the run; None means the name of the recipe, below ``runs``.
        overrides: ``stages.sft.epochs=2`` texts, as after ``--set``.
        force: run changed stages, and the one named by ``only`` or ``from_``, again. If there is
            none, the finished run is returned.
        only: run only this stage, or these.
        from_: skip the stages before this one.
        until: skip the stages after this one.
        runs: folder of the runs, in which RUN/STAGE is looked up.
        quiet: show no progress.

    Raises:
        RecipeError: nothing was started; one line for each error.
        RunError: a stage failed, or an expectation of the recipe does not hold.
        Preempted: SIGTERM stopped the run.
        KeyboardInterrupt: the run was interrupted and can be resumed.
    """
    if isinstance(recipe, Mapping):
        folder = Path(out or Path(runs) / str(recipe.get("name", "unnamed")))
        recipe = Writer(folder).plain(recipe)
    if isinstance(recipe, Recipe):
        loaded = given = load_recipe(recipe, overrides)
    else:
        given = _resolved(recipe, overrides, runs=Path(runs))
        loaded = given.recipe
    folder = Path(out or Path(runs) / loaded.name)
    chosen = only if only is None or isinstance(only, str) else ",".join(only)
    choice = {"force": force, "only": chosen, "from_": from_, "until": until}
    return execute(given, folder, quiet=quiet, **choice)


def execute(recipe: Recipe | Resolved, folder: Path, *, quiet: bool, **choice: Any) -> Run:
    """Run a valid recipe and raise what ``align run`` tells by its exit code.

    Args:
        recipe: the recipe, or with the places that errors of its stages show.
        folder: folder of the run.
        quiet: show no progress.
        choice: the arguments of ``align.run`` that choose stages.
    """
    signals, observer = Signals(), _Observer(make_console(quiet=quiet))
    given = {"run_dir": folder, "terminal": observer, "signals": signals}
    try:
        code = run_recipe(recipe, **given, **choice)
    except NothingChanged:  # a finished run is what the caller asks for
        code = run_recipe(recipe, **given, **{**choice, "force": False})
    if code == EXIT_PREEMPTED:
        text = f"{folder}: stopped by a signal; the same call again resumes"
        if signals.last == signal.SIGINT:
            raise KeyboardInterrupt(text)
        raise Preempted(text)
    if code != EXIT_OK:
        raise RunError(observer.problem or f"{folder}: failed", stage=observer.stage, code=code)
    return Run(folder)


def _last_record(lines: Sequence[str]) -> str:
    """Return the last record of a log without its time; the whole log if nothing was logged."""
    starts = [i for i, line in enumerate(lines) if LOG_LINE.match(line.encode())]
    return "\n".join(lines[starts[-1] if starts else 0 :]).partition(" ")[2]


class _Observer(Terminal):
    """A terminal that remembers why the run failed."""

    stage = problem = ""

    def failed(self, stage: str, reason: str, *, log: Path, tail: Sequence[str], code: int) -> None:
        """Show why a stage failed, and keep its last message."""
        super().failed(stage, reason, log=log, tail=tail, code=code)
        said = "\n".join(self.messages(stage, tail)) or _last_record(tail)
        self.stage = stage
        self.problem = f"stage {stage} failed ({reason}): {said}\nThe whole log: {log}"

    def summary(self, summary: Mapping[str, Any], report: Path, *, order: Sequence[str]) -> None:
        """Show the summary, and keep the expectations that do not hold."""
        super().summary(summary, report, order=order)
        if any(not entry["holds"] for entry in summary.get("expectations", [])):
            self.problem = "\n".join(
                [*map(str, expectation_lines(summary)), f"the run is in {report.parent}"]
            )
