"""Forms of the labels, for admins: projects, items, instructions, verdicts, snapshots, training."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Response, UploadFile
from fastapi.responses import RedirectResponse

from align.core.errors import DataError
from align.data.labels import snapshot_number
from align.data.reading.sources import suffix_of
from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.labels.conflicts import decide
from align.serve.labels.export import export_newest
from align.serve.labels.items import Candidate, add_items, from_samples, read_file, side_of
from align.serve.labels.progress import sources
from align.serve.labels.tables import Kind, Project, Queue, create_project, set_instructions
from align.serve.labels.training import (
    queue_training,
    readers,
    stop_training,
    write_derived,
)
from align.serve.labels.work import PREFIX, project_named
from align.serve.services import Services

MAX_INSTRUCTIONS = 20_000


@dataclass(frozen=True, slots=True)
class Given:
    """The items of a form.

    Attributes:
        batch: name of the file, or the models that were sampled.
        read: returns the items for a kind of project.
    """

    batch: str
    read: Callable[[Kind], list[Candidate]]


def form_router(services: Services) -> APIRouter:
    """Return the routes of the forms; every one of them needs an admin."""
    router = APIRouter(prefix=PREFIX, dependencies=[Depends(services.auth.form)])
    _add_projects(router, services)
    _add_decisions(router, services)
    _add_training(router, services)
    return router


def _back(name: str, place: str = "") -> Response:
    return RedirectResponse(f"{PREFIX}/{name}{place}", status_code=303)


# ---- projects and items


def _add_projects(router: APIRouter, services: Services) -> None:
    items = Depends(_given(services))

    @router.post("")
    def create(
        *,
        name: Annotated[str, Form()],
        kind: Annotated[Kind, Form()] = "pairwise",
        queue: Annotated[Queue, Form()] = "random",
        wanted: Annotated[int, Form()] = 1,
        gold_rate: Annotated[float, Form()] = 0.0,
        repeat_rate: Annotated[float, Form()] = 0.0,
        reasons: Annotated[str, Form()] = "",
        instructions: Annotated[str, Form(max_length=MAX_INSTRUCTIONS)] = "",
        given: Annotated[Given, items],
    ) -> Response:
        project = Project(
            name,
            kind,
            queue,
            wanted=wanted,
            gold_rate=gold_rate,
            repeat_rate=repeat_rate,
            reasons=tuple(line.strip() for line in reasons.splitlines() if line.strip()),
            instructions=instructions.strip(),
        )
        found = given.read(kind)
        with services.store.write() as db:
            add_items(db, create_project(db, project), found, batch=given.batch)
        return _back(name)

    @router.post("/{name}/items")
    def add(name: str, given: Annotated[Given, items]) -> Response:
        with services.store.read() as db:
            project = project_named(db, name)
        found = given.read(project.kind)  # reading files takes time, in which others label
        with services.store.write() as db:
            add_items(db, project, found, batch=given.batch)
        return _back(name)

    @router.post("/{name}/instructions")
    def instruct(
        name: str, instructions: Annotated[str, Form(max_length=MAX_INSTRUCTIONS)] = ""
    ) -> Response:
        with services.store.write() as db:
            set_instructions(db, project_named(db, name), instructions.strip())
        return _back(name, "/instructions")


def _given(services: Services) -> Callable[..., Any]:
    """Return a dependency that returns the items of a form."""

    def given(
        *,
        file: UploadFile | None = None,
        first: Annotated[str, Form()] = "",
        second: Annotated[str, Form()] = "",
        by: Annotated[str, Form()] = "",
        gold: Annotated[bool, Form()] = False,
    ) -> Given:
        def read(kind: Kind) -> list[Candidate]:
            if file is not None and file.filename:
                return _uploaded(file, kind, gold=gold)
            # Only what the form offers: a path from outside must not name any other folder.
            known = sources(services.settings.runs)
            chosen = [side for side in (first, second) if side]
            if not chosen or not set(chosen) <= set(known):
                raise ServeError(400, "Choose a file, or one or two models that have samples.")
            sides = [side_of(text, services.settings.runs) for text in chosen]
            return from_samples(sides, kind, by=by.replace(",", " ").split())

        batch = Path(file.filename or "").name if file is not None else ""
        return Given(batch or " against ".join(filter(None, (first, second))), read)

    return given


def _uploaded(file: UploadFile, kind: Kind, *, gold: bool) -> list[Candidate]:
    """Return the items of an uploaded file; messages name it as the user does."""
    name = Path(file.filename or "").name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix_of(Path(name)) or '.jsonl'}"
        path.write_bytes(file.file.read())
        try:
            found = read_file(str(path), kind, gold=gold)
        except DataError as error:
            raise DataError(str(error).replace(str(path), name), code=error.code) from None
    return [replace(item, source=item.source.replace(str(path), name)) for item in found]


# ---- verdicts


def _add_decisions(router: APIRouter, services: Services) -> None:
    @router.post("/{name}/conflicts/{item}")
    def verdict(
        name: str,
        item: int,
        *,
        person: Annotated[Person, Depends(services.auth.form)],
        answer: Annotated[str, Form()] = "",
    ) -> Response:
        with services.store.write() as db:
            project = project_named(db, name)
            decide(db, project, item, answer=answer, decided_by=person.name)
        return _back(name, "/conflicts")


# ---- snapshots and training


def _add_training(router: APIRouter, services: Services) -> None:
    @router.post("/{name}/export")
    def export_labels(name: str) -> Response:
        with services.store.read() as db:
            project_named(db, name)
        export_newest(services.store, name)
        return _back(name, "#train")

    @router.post("/{name}/train")
    def train(name: str, recipe: Annotated[str, Form()]) -> Response:
        with services.store.read() as db:
            project = project_named(db, name)
        # Only what the page offers: a path from outside must not name any other file.
        reader = next((r for r in readers(project) if str(r.path) == recipe), None)
        if reader is None:
            raise ServeError(400, f"{recipe[:200]}: no recipe that reads labels: {name}")
        number = snapshot_number(export_newest(services.store, name))
        path = write_derived(reader, project, number)
        with services.store.write() as db:
            queue_training(db, project, reader, number=number, path=path)
        return _back(name, "#train")

    @router.post("/{name}/stop")
    def stop(name: str, run: Annotated[str, Form()]) -> Response:
        with services.store.write() as db:
            stop_training(db, project_named(db, name), run)
        return _back(name, "#train")
