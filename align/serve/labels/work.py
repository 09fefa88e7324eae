"""Requests of the labeling page, whose answers and errors are JSON."""

import re
import sqlite3
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from align.core.errors import AlignError, DataError
from align.core.types import Text
from align.serve.auth import Person
from align.serve.errors import ServeError, broken_text, not_found
from align.serve.labels.progress import progress_of
from align.serve.labels.tables import Project, find_project
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

PREFIX = "/labels"
MAX_BESIDE = 200
"""Characters of the list of tasks that a page has already."""
_LIST = re.compile(r"(?:[0-9]{1,18}(?:,[0-9]{1,18})*)?")


def project_named(db: sqlite3.Connection, name: str) -> Project:
    """Return the project of a path.

    Raises:
        ServeError: there is none.
    """
    try:
        return find_project(db, name)
    except DataError:
        raise not_found("labeling project", name) from None


class Said(BaseModel):
    """The answer to a task, as the labeling page sends it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    skip: bool = False
    choice: str = ""
    edit: str | None = None
    steps: list[bool] | None = None
    reasons: list[str] = []
    seconds: float = 0.0


def work_router(services: Services) -> APIRouter:
    """Return the routes for admins and annotators."""
    router = APIRouter(prefix=PREFIX, route_class=_JsonRoute)
    sender = Depends(services.auth.labeler_form)

    @router.post("/{name}/next")
    def next_(name: str, person: Annotated[Person, sender], beside: str = "") -> dict[str, Any]:
        if len(beside) > MAX_BESIDE or not _LIST.fullmatch(beside):
            raise ServeError(400, "beside: expected numbers of tasks")
        mine = [int(text) for text in beside.split(",") if text]
        with services.store.write() as db:
            project = project_named(db, name)
            task = next_task(db, project, person.name, beside=mine)
            return _shown(task) | progress_of(db, project, person)

    @router.post("/{name}/tasks/{task}")
    def answer(
        name: str,
        task: Annotated[int, Path(ge=1, lt=2**63)],  # what the database can compare
        said: Said,
        *,
        person: Annotated[Person, sender],
    ) -> dict[str, Any]:
        with services.store.write() as db:
            project = project_named(db, name)
            if said.skip:
                skip(db, project, person.name, task=task)
            else:
                steps = None if said.steps is None else tuple(said.steps)
                given = Answer(said.choice, said.edit, steps, tuple(said.reasons), said.seconds)
                record_answer(db, project, person.name, task=task, answer=given)
            return progress_of(db, project, person)

    @router.post("/{name}/undo")
    def undo_(name: str, person: Annotated[Person, sender]) -> dict[str, Any]:
        with services.store.write() as db:
            project = project_named(db, name)
            task = undo(db, project, person.name)
            return _shown(task) | progress_of(db, project, person)

    return router


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
    return [{key: turn[key] for key in kept if turn.get(key)} for turn in map(dict, text)]


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
            except UnicodeEncodeError:
                return JSONResponse({"error": str(broken_text())}, 400)
            except TaskGone as error:
                return JSONResponse({"error": str(error)}, 409)
            except AlignError as error:
                return JSONResponse({"error": str(error)}, 400)
            except RequestValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                return JSONResponse({"error": f"{place}: {first['msg']}"}, 400)

        return answer
