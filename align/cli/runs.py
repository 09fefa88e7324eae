"""Look at runs: which there are, what a stage logs, and the report."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from align.core.errors import AlignError, ArtifactError
from align.core.text import visible

POLL_S = 0.5
TAIL = 20
"""Lines of a log that are shown first."""
REASON = 120
"""Characters of the reason for which a run failed."""

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="runs/<recipe>")]


def runs_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder of the runs")] = Path(
        "runs"
    ),
) -> None:
    """List the runs of a folder: stages done, state, and failed expectations."""
    rows = [_row(path) for path in sorted(folder.glob("*")) if _stages(path)]
    if not rows:
        found = "no runs in this folder" if folder.is_dir() else "no such folder"
        raise ArtifactError(f"{folder}: {found}. Start a run with: align run RECIPE")
    width = max(len(name) for name, *_ in rows)
    for name, state, reason in rows:
        typer.echo(visible(f"{name:<{width}}  {state}"))
        if reason:
            typer.echo(visible(f"{'':<{width}}  {reason}"))


def _stages(run_dir: Path) -> list[Path]:
    """Return the stage folders of a run, by when they began."""
    found = [path.parent for path in run_dir.glob("*/recipe.yaml")]
    return sorted(found, key=lambda stage: (stage / "recipe.yaml").stat().st_mtime)


def _row(run_dir: Path) -> tuple[str, str, str]:
    """Return the name of a run, its state, and why it failed (empty if it did not)."""
    from align.core.artifacts import MANIFEST, read_json_object
    from align.recipe.load import RECIPE_FILE, read_resolved

    stages = _stages(run_dir)
    done = {stage.name for stage in stages if (stage / MANIFEST).is_file()}
    try:
        names = list(read_resolved(stages[-1] / RECIPE_FILE).stages)
    except AlignError:  # damaged, or written by another version
        names = [stage.name for stage in stages]
    parts = [f"{len(done & set(names))} of {len(names)} stages done"]
    now, reason = _state(run_dir, stages, [name for name in names if name not in done])
    parts += [now] if now else []
    changed = max(path.stat().st_mtime for stage in stages for path in stage.glob("*"))
    parts.append(f"{datetime.fromtimestamp(changed):%Y-%m-%d %H:%M}")
    listed = (read_json_object(run_dir / "summary.json") or {}).get("expectations")
    expectations = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    if failed := sum(not entry.get("holds", True) for entry in expectations):
        parts.append(f"{failed} of {len(expectations)} expectations FAILED")
    return run_dir.name, ", ".join(parts), reason


def _state(run_dir: Path, stages: Sequence[Path], left: Sequence[str]) -> tuple[str, str]:
    """Return what a run does now, or how its last attempt ended, and why it failed.

    The first is empty if all is done, the second if nothing failed.

    Args:
        run_dir: the run.
        stages: folders of its stages, by when they began.
        left: names of the stages that are not done, in the order of the recipe.
    """
    from align.core.lock import RUN_LOCK, is_held
    from align.pipeline.following import last_end, last_error

    begun = [stage for stage in stages if stage.name in left]
    # A stage that a launcher started without align run has only a lock of its own.
    locks = [is_held(run_dir, RUN_LOCK), *(is_held(stage) for stage in begun)]
    name = begun[-1].name if begun else next(iter(left), "")
    if True in locks:
        return f"running: {name or 'the end'}", ""
    if not begun:
        return (f"next: {name}" if name else ""), ""
    end = last_end(begun[-1], locks)
    reason = last_error(begun[-1]) if end == "failed" else ""
    told = reason.partition("\n")[0].removeprefix(f"stage {name} failed: ")
    return f"{end} in {name}", told if len(told) <= REASON else f"{told[: REASON - 1]}…"


def logs(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN[/STAGE]", help="a run or a stage")],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="keep showing new lines until Ctrl+C")
    ] = False,
) -> None:
    """Show the end of a stage's log; for a run, the log of the stage that started last."""
    stage = run_dir if (run_dir / "log.txt").is_file() else next(reversed(_stages(run_dir)), None)
    path = None if stage is None else stage / "log.txt"
    if path is None or not path.is_file():
        raise ArtifactError(f"{run_dir}: no log.txt; expected runs/<recipe> or one of its stages")
    typer.echo(visible(f"{path}:"))
    for line in _lines(path, follow=follow):
        typer.echo(visible(line))


def _lines(path: Path, *, follow: bool) -> Iterator[str]:
    """Yield the last lines of a file, then those that are appended."""
    with path.open(encoding="utf-8", errors="replace") as f:
        yield from f.read().splitlines()[-TAIL:]
        while follow:
            if line := f.readline():
                yield line.rstrip("\n")
            else:
                sys.stdout.flush()
                time.sleep(POLL_S)


def open_(run_dir: RunFolder) -> None:
    """Open a run's report in the browser, or print its path if there is no browser."""
    import webbrowser

    from align.report import REPORT_FILE, build_report

    path = run_dir / REPORT_FILE
    if not path.is_file():
        path = build_report(run_dir)
    typer.echo(visible(str(path)))
    if _has_browser():
        webbrowser.open(path.resolve().as_uri())


def _has_browser() -> bool:
    """Return whether a browser with a window can be started."""
    shown: Any = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.platform == "darwin" or bool(shown)
