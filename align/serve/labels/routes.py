"""The pages of the labels, and the requests of the labeling page."""

import re
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from align.core.errors import AlignError, DataError
from align.core.types import Text
from align.data.labels import RECORD
from align.data.reading.sources import suffix_of
from align.serve.auth import Person
from align.serve.errors import ServeError, not_found
from align.serve.labels.export import export
from align.serve.labels.items import Candidate, add_items, from_samples, read_file, side_of
from align.serve.labels.progress import exported, progress_of, recipes_of, sources, trained
from align.serve.labels.quality import quality_of
from align.serve.labels.tables import (
    Kind,
    Project,
    Queue,
    all_projects,
    create_project,
    find_project,
)
from align.serve.labels.tasks import (
    Answer,
    Task,
    TaskGone,
    next_task,
    record_answer,
    skip,
    undo,
)
from align.serve.services import Services

MAX_BESIDE = 200
"""Characters of the list of tasks that a page has already."""
MAX_COMPARED = 8
"""Runs that the page of a comparison takes; the newest ones are compared."""
_LIST = re.compile(r"(?:[0-9]{1,18}(?:,[0-9]{1,18})*)?")


def make_router(services: Services) -> APIRouter:
    """Return the routes below ``/labels``."""
    router = APIRouter(prefix="/labels")
    _add_pages(router, services)
    _add_changes(router, services)
    work = APIRouter(route_class=_JsonRoute)
    _add_work(work, services)
    router.include_router(work)
    return router


def _find(db: sqlite3.Connection, name: str) -> Project:
    try:
        return find_project(db, name)
    except DataError:
        raise not_found("labeling project", name) from None


# ---- pages


def _add_pages(router: APIRouter, services: Services) -> None:
    reader = Depends(services.auth.browser)

    @router.get("")
    def projects(request: Request, _person: Annotated[Person, reader]) -> Response:
        with services.store.read() as db:
            found = [(project, quality_of(db, project)) for project in all_projects(db)]
        shown = {"projects": found, "sources": sources(services.settings.runs)}
        return services.page(request, "labels/projects.html", **shown)

    @router.get("/{name}")
    def project(request: Request, name: str, person: Annotated[Person, reader]) -> Response:
        with services.store.read() as db:
            project = _find(db, name)
            quality = quality_of(db, project)
            progress = progress_of(db, project, person.name)
        runs = services.settings.runs
        return services.page(
            request,
            "labels/project.html",
            project=project,
            quality=quality,
            progress=progress,
            snapshots=exported(project),
            recipes=[(r, trained(runs, r, project)[-MAX_COMPARED:]) for r in recipes_of(project)],
            sources=sources(runs),
            runs=runs,
        )

    @router.get("/{name}/work")
    def work(request: Request, name: str, _person: Annotated[Person, reader]) -> Response:
        with services.store.read() as db:
            project = _find(db, name)
        return services.page(request, "labels/work.html", project=project)

    @router.get("/{name}/snapshots/{number}/{file}")
    def snapshot(
        name: str, number: int, file: str, *, _person: Annotated[Person, reader]
    ) -> Response:
        with services.store.read() as db:
            project = _find(db, name)
        for found in exported(project):
            if found.number == number and file in (*found.files, RECORD):
                # Models wrote the texts, so a browser must not open them as a page.
                return FileResponse(
                    found.folder / file,
                    media_type="application/jsonl",
                    filename=f"{name}-{number}-{file}",
                )
        raise not_found("snapshot", f"{number}/{file}")


# ---- forms


def _add_changes(router: APIRouter, services: Services) -> None:
    sender = Depends(services.auth.form)
    items = Depends(_given(services))

    @router.post("")
    def create(
        *,
        _person: Annotated[Person, sender],
        name: Annotated[str, Form()],
        kind: Annotated[Kind, Form()] = "pairwise",
        queue: Annotated[Queue, Form()] = "random",
        wanted: Annotated[int, Form()] = 1,
        gold_rate: Annotated[float, Form()] = 0.0,
        repeat_rate: Annotated[float, Form()] = 0.0,
        reasons: Annotated[str, Form()] = "",
        instructions: Annotated[str, Form(max_length=5000)] = "",
        given: Annotated[Callable[[Kind], list[Candidate]], items],
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
        found = given(kind)
        with services.store.write() as db:
            add_items(db, create_project(db, project), found)
        return RedirectResponse(f"/labels/{name}", status_code=303)

    @router.post("/{name}/items")
    def add(
        name: str,
        _person: Annotated[Person, sender],
        given: Annotated[Callable[[Kind], list[Candidate]], items],
    ) -> Response:
        with services.store.read() as db:
            project = _find(db, name)
        found = given(project.kind)  # reading files takes time, in which others label
        with services.store.write() as db:
            add_items(db, project, found)
        return RedirectResponse(f"/labels/{name}", status_code=303)

    _add_export(router, services)


def _add_export(router: APIRouter, services: Services) -> None:
    sender = Depends(services.auth.form)

    @router.post("/{name}/export")
    def export_labels(name: str, _person: Annotated[Person, sender]) -> Response:
        with services.store.write() as db:
            export(db, _find(db, name))
        return RedirectResponse(f"/labels/{name}#snapshots", status_code=303)


def _given(services: Services) -> Callable[..., Any]:
    """Return a dependency that returns a function from a kind to the items of a form."""

    def given(
        *,
        file: UploadFile | None = None,
        first: Annotated[str, Form()] = "",
        second: Annotated[str, Form()] = "",
        by: Annotated[str, Form()] = "",
        gold: Annotated[bool, Form()] = False,
    ) -> Callable[[Kind], list[Candidate]]:
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

        return read

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


# ---- labeling


class Said(BaseModel):
    """The answer to a task, as the labeling page sends it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    skip: bool = False
    choice: str = ""
    edit: str | None = None
    steps: list[bool] | None = None
    reasons: list[str] = []
    seconds: float = 0.0


def _add_work(router: APIRouter, services: Services) -> None:
    sender = Depends(services.auth.form)

    @router.post("/{name}/next")
    def next_(name: str, person: Annotated[Person, sender], beside: str = "") -> dict[str, Any]:
        if len(beside) > MAX_BESIDE or not _LIST.fullmatch(beside):
            raise ServeError(400, "beside: expected numbers of tasks")
        mine = [int(text) for text in beside.split(",") if text]
        with services.store.write() as db:
            project = _find(db, name)
            task = next_task(db, project, person.name, beside=mine)
            return _shown(task) | progress_of(db, project, person.name)

    @router.post("/{name}/tasks/{task}")
    def answer(
        name: str, task: int, said: Said, *, person: Annotated[Person, sender]
    ) -> dict[str, Any]:
        with services.store.write() as db:
            project = _find(db, name)
            if said.skip:
                skip(db, project, person.name, task=task)
            else:
                steps = None if said.steps is None else tuple(said.steps)
                given = Answer(said.choice, said.edit, steps, tuple(said.reasons), said.seconds)
                record_answer(db, project, person.name, task=task, answer=given)
            return progress_of(db, project, person.name)

    @router.post("/{name}/undo")
    def undo_(name: str, person: Annotated[Person, sender]) -> dict[str, Any]:
        with services.store.write() as db:
            project = _find(db, name)
            task = undo(db, project, person.name)
            return _shown(task) | progress_of(db, project, person.name)


def _shown(task: Task | None) -> dict[str, Any]:
    """Return a task for the page: texts only, nothing about models or files."""
    if task is None:
        return {"task": None}
    responses = [_turns(response, "assistant") for response in task.responses]
    return {"task": {"id": task.id, "prompt": _turns(task.prompt, "user"), "responses": responses}}


def _turns(text: Text, role: str) -> list[dict[str, Any]]:
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    kept = ("role", "content", "reasoning_content", "tool_calls")
    return [{key: turn[key] for key in kept if turn.get(key)} for turn in text]


class _JsonRoute(APIRoute):
    """A route whose errors are JSON: ``{"error": ...}``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of a request."""
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except ServeError as error:
                return JSONResponse({"error": str(error)}, error.status, headers=error.headers)
            except TaskGone as error:
                return JSONResponse({"error": str(error)}, 409)
            except AlignError as error:
                return JSONResponse({"error": str(error)}, 400)
            except RequestValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                return JSONResponse({"error": f"{place}: {first['msg']}"}, 400)

        return answer
