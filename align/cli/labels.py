"""The commands ``align labels list``, ``import`` and ``export``: labels without the server."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from align.cli.options import Runs
from align.core.errors import DataError, RecipeError
from align.core.text import visible

if TYPE_CHECKING:
    import sqlite3

    from align.serve.labels.items import Candidate
    from align.serve.labels.tables import Project
    from align.serve.store import Store

labels = typer.Typer(
    help="Collect preference labels from people (docs/labels.md).", no_args_is_help=True
)
NOTHING = "no labeling project in it. Make one with: align labels import NAME FILE"
Name = Annotated[str, typer.Argument(metavar="NAME", help="name of the labeling project")]
File = Annotated[
    str | None, typer.Argument(metavar="FILE", help="pairs or responses: file or hub id")
]
Samples = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RUN/STAGE[:MODEL]", help="samples of a run instead of a file; give one or two"
    ),
]
Scores = Annotated[
    list[str] | None,
    typer.Option(metavar="SCORE", help="score of the samples, for the queue; repeatable"),
]


@contextmanager
def _database(runs: Path, *, create: bool = False) -> Iterator["sqlite3.Connection"]:
    """Yield the labels of a runs folder, inside a transaction.

    Raises:
        DataError: as ``_store``.
    """
    with _store(runs, create=create).write() as db:
        yield db


def _store(runs: Path, *, create: bool = False) -> "Store":
    """Return the database of a runs folder.

    Raises:
        DataError: nothing was labeled there, and ``create`` is False.
    """
    from align.serve.labels import MIGRATIONS, NAME
    from align.serve.settings import Settings
    from align.serve.store import DATABASE, Store

    folder = Settings(runs=runs).data
    if not create and not (folder / DATABASE).is_file():
        raise DataError(f"{runs}: {NOTHING}")
    store = Store(folder)
    store.migrate(NAME, MIGRATIONS)
    return store


@labels.command("list")
def list_(runs: Runs = Path("runs")) -> None:
    """List the labeling projects with their progress and newest snapshot."""
    from align.data.labels import snapshots
    from align.serve.labels.quality import quality_of
    from align.serve.labels.tables import all_projects

    with _database(runs) as db:
        projects = all_projects(db)
        if not projects:
            raise DataError(f"{runs}: {NOTHING}")
        for project in projects:
            found = quality_of(db, project)
            kept = snapshots(project.name)
            typer.echo(
                f"{project.name}: {project.kind}, {found.labeled} of {found.items} items labeled, "
                f"{found.labels} labels by {len(found.annotators)} annotators, "
                f"{f'newest snapshot {kept[-1]}' if kept else 'never exported'}"
            )


@labels.command("import")
def import_(
    name: Name,
    file: File = None,
    samples: Samples = None,
    by: Scores = None,
    gold: Annotated[
        bool, typer.Option("--gold", help="the file's labels are known answers, to test annotators")
    ] = False,
    kind: Annotated[
        Literal["pairwise", "thumbs", "steps"] | None,
        typer.Option(help="kind of a new project (default: pairwise)"),
    ] = None,
    queue: Annotated[
        Literal["random", "margin", "ensemble"] | None,
        typer.Option(help="which items of a new project come first (default: random)"),
    ] = None,
    wanted: Annotated[
        int | None, typer.Option(metavar="N", help="labels per item of a new project (default: 1)")
    ] = None,
    gold_rate: Annotated[
        float | None, typer.Option(help="fraction of shown items with a known answer (default: 0)")
    ] = None,
    repeat_rate: Annotated[
        float | None, typer.Option(help="fraction of shown items that are repeated (default: 0)")
    ] = None,
    reason: Annotated[
        list[str] | None, typer.Option(help="reason that annotators can tick; repeatable")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="random seed of the order (default: 0)")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Add items to a labeling project, which is created if it does not exist."""
    from align.serve.labels.items import add_items

    given = {
        "kind": kind,
        "queue": queue,
        "wanted": wanted,
        "gold_rate": gold_rate,
        "repeat_rate": repeat_rate,
        "reasons": tuple(reason) if reason else None,
        "seed": seed,
    }
    with _database(runs, create=True) as db:
        project = _project(db, name, {k: v for k, v in given.items() if v is not None})
        found = _candidates(project, file, samples or [], by=by or [], gold=gold, runs=runs)
        batch = Path(file).name if file is not None else " against ".join(samples or ())
        added, known = add_items(db, project, found, batch=batch)
    typer.echo(visible(f"{name}: {added} items added, {known} were in the project already"))


def _project(db: "sqlite3.Connection", name: str, settings: dict[str, Any]) -> "Project":
    """Return the project, created with these settings if there is none.

    Raises:
        RecipeError: it exists, but settings are given.
    """
    from align.serve.labels.tables import Project, all_projects, create_project

    project = next((p for p in all_projects(db) if p.name == name), None)
    if project is None:
        return create_project(db, Project(name, **settings))
    if settings:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in settings)
        raise RecipeError(
            f"{name}: this project exists and keeps its settings. Leave out {options}, or use "
            "another name"
        )
    return project


def _candidates(
    project: "Project",
    file: str | None,
    samples: list[str],
    *,
    by: list[str],
    gold: bool,
    runs: Path,
) -> list["Candidate"]:
    from align.serve.labels.items import from_samples, read_file, side_of

    if (file is None) == (not samples) or len(samples) > 2:
        raise RecipeError("labels import: give a FILE, or --samples once or twice")
    if file is not None:
        if by:
            raise RecipeError("--by has no effect on a file, whose rows have 'margin'; remove it")
        return read_file(file, project.kind, gold=gold)
    if gold:
        raise RecipeError("--gold needs a FILE: samples have no known answer")
    return from_samples([side_of(text, runs) for text in samples], project.kind, by=by)


@labels.command()
def votes(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="new file: .csv or .jsonl")],
    runs: Runs = Path("runs"),
) -> None:
    """Write every single label as a table, including gold and repeated items."""
    from align.serve.labels.tables import find_project
    from align.serve.labels.votes import votes_text

    suffix = file.suffix.removeprefix(".")
    if suffix not in ("csv", "jsonl"):
        raise RecipeError(f"{file}: expected a name that ends with .csv or .jsonl")
    with _database(runs) as db:
        text = votes_text(db, find_project(db, name), suffix)
    try:
        with file.open("x", encoding="utf-8", newline="") as f:
            f.write(text)
    except FileExistsError:
        raise DataError(f"{file}: this file exists; use another name or remove it") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be written: {error.strerror}") from None
    typer.echo(visible(f"{file} written"))


@labels.command()
def export(name: Name, runs: Runs = Path("runs")) -> None:
    """Export the labels as a snapshot, which a recipe reads with labels: NAME."""
    import json

    from align.core.artifacts import file_sha256
    from align.data.labels import RECORD
    from align.serve.labels.export import export_newest

    folder = export_newest(_store(runs), name)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    counts = ", ".join(f"{count} {what}" for what, count in sorted(record["items"].items()))
    typer.echo(visible(f"{folder}: items: {counts}; sha256 {file_sha256(folder / RECORD)}"))
    for file, entry in sorted(record["files"].items()):
        typer.echo(f"  {file}: {entry['rows']} rows, sha256 {entry['sha256']}")
