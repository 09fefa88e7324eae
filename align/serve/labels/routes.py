"""The pages of the labels: for admins everything, for annotators their own work."""

import json
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse, RedirectResponse

from align.data.labels import RECORD
from align.serve.auth import Person
from align.serve.errors import not_found
from align.serve.labels.conflicts import conflicts
from align.serve.labels.forms import form_router
from align.serve.labels.items import ANSWERS
from align.serve.labels.progress import batches, exported, progress_of, sources
from align.serve.labels.quality import quality_of
from align.serve.labels.tables import Project, all_projects
from align.serve.labels.training import readers, trained, trainings
from align.serve.labels.votes import votes_text
from align.serve.labels.work import PREFIX, project_named, work_router
from align.serve.services import Services

MAX_COMPARED = 8
"""Runs that the page of a comparison takes; the newest ones are compared."""
SHOWN_CONFLICTS = 50
NAMES = {
    "pairwise": {"a": "A is better", "b": "B is better", "tie": "Tie", "bad": "Both bad"},
    "thumbs": {"good": "Good", "bad": "Bad"},
}
"""Answers as the pages call them."""


def make_router(services: Services) -> APIRouter:
    """Return the routes below ``/labels``."""
    router, pages = APIRouter(), APIRouter(prefix=PREFIX)
    _add_pages(pages, services)
    admin = APIRouter(prefix=PREFIX, dependencies=[Depends(services.auth.browser)])
    _add_results(admin, services)
    _add_downloads(admin, services)
    for part in (pages, admin, form_router(services), work_router(services)):
        router.include_router(part)
    return router


# ---- for everybody


def _add_pages(router: APIRouter, services: Services) -> None:
    reader = Depends(services.auth.labeler)

    @router.get("")
    def projects(request: Request, person: Annotated[Person, reader]) -> Response:
        with services.store.read() as db:
            kept = all_projects(db)
            if not person.is_admin:
                mine = [(project, progress_of(db, project, person)) for project in kept]
                return services.page(request, "labels/mine.html", projects=mine)
            found = [(project, quality_of(db, project)) for project in kept]
        shown = {"projects": found, "sources": sources(services.settings.runs)}
        return services.page(request, "labels/projects.html", **shown)

    @router.get("/{name}/work")
    def work(request: Request, name: str, _person: Annotated[Person, reader]) -> Response:
        with services.store.read() as db:
            project = project_named(db, name)
        return services.page(request, "labels/work.html", project=project)

    @router.get("/{name}/instructions")
    def instructions(request: Request, name: str, _person: Annotated[Person, reader]) -> Response:
        with services.store.read() as db:
            project = project_named(db, name)
        return services.page(request, "labels/instructions.html", project=project)

    @router.get("/{name}")
    def project(request: Request, name: str, person: Annotated[Person, reader]) -> Response:
        with services.store.read() as db:
            project = project_named(db, name)
            if not person.is_admin:
                return RedirectResponse(f"/labels/{name}/instructions", status_code=303)
            shown = {
                "quality": quality_of(db, project),
                "progress": progress_of(db, project, person),
                "batches": batches(db, project),
                "conflicts": conflicts(db, project),
            }
        more = {"snapshots": exported(project), "sources": sources(services.settings.runs)}
        found = _training(services, project)
        return services.page(
            request, "labels/project.html", project=project, **shown, **more, **found
        )


# ---- for admins


def _training(services: Services, project: Project) -> dict[str, Any]:
    """Return what the part of a page about training shows."""
    runs = services.settings.runs
    with services.store.read() as db:
        found = trainings(db, project)
    return {
        "runs": runs,
        "trainings": found,
        "recipes": [
            (reader, trained(runs, reader, project)[-MAX_COMPARED:]) for reader in readers(project)
        ],
    }


def _add_results(router: APIRouter, services: Services) -> None:
    @router.get("/{name}/conflicts")
    def disagreements(request: Request, name: str) -> Response:
        with services.store.read() as db:
            project = project_named(db, name)
            found = conflicts(db, project)
        return services.page(
            request,
            "labels/conflicts.html",
            project=project,
            conflicts=found[:SHOWN_CONFLICTS],
            total=len(found),
            choices=ANSWERS.get(project.kind),
            named=partial(_named, project),
        )

    @router.get("/{name}/training")
    def training(request: Request, name: str) -> Response:
        with services.store.read() as db:
            project = project_named(db, name)
        found = _training(services, project)
        return services.page(request, "labels/training.html", project=project, **found)


def _named(project: Project, answer: str) -> str:
    """Return an answer as a page calls it: words, or a mark for each step."""
    if project.kind == "steps":
        return " ".join("✓" if correct else "✗" for correct in json.loads(answer))
    return NAMES[project.kind][answer]


def _add_downloads(router: APIRouter, services: Services) -> None:
    @router.get("/{name}/labels.{suffix}")
    def votes(name: str, suffix: Literal["csv", "jsonl"]) -> Response:
        with services.store.read() as db:
            text = votes_text(db, project_named(db, name), suffix)
        # Models wrote the texts, so a browser must not open them as a page.
        headers = {"content-disposition": f'attachment; filename="{name}-labels.{suffix}"'}
        media = {"csv": "text/csv; charset=utf-8", "jsonl": "application/jsonl"}[suffix]
        return Response(text, media_type=media, headers=headers)

    @router.get("/{name}/snapshots/{number}/{file}")
    def snapshot(name: str, number: int, file: str) -> Response:
        with services.store.read() as db:
            project = project_named(db, name)
        for found in exported(project):
            if found.number == number and file in (*found.files, RECORD):
                return FileResponse(
                    found.folder / file,
                    media_type="application/jsonl",
                    filename=f"{name}-{number}-{file}",
                )
        raise not_found("snapshot", f"{number}/{file}")
