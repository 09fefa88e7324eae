"""Routes of the live pages."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, StreamingResponse
from markupsafe import Markup

from align import report
from align.core.text import visible
from align.report.compare import comparison_page, named_runs, shared_charts
from align.report.markup import duration
from align.report.sections import missing
from align.report.series import payload
from align.serve.errors import ServeError, not_found
from align.serve.live.process import Resumed, stop
from align.serve.live.samples import search
from align.serve.live.state import (
    PARTS,
    Records,
    find_run,
    newest_runs,
    stages_of,
    state_of,
    versions,
)
from align.serve.services import Services

POLL_S = 1.0
STREAM_S = 600.0
"""Seconds after which a stream of events ends; the browser opens the next one."""
LOG_BYTES, LOG_LINES = 64 * 1024, 300
MAX_COMPARED = 8
Page = Annotated[int, Query(ge=0, le=10**6)]
GROUPS = ("Results", "Training", "Samples", "Data", "Checks", "Reproduce")
"""Those of the report; the curves of a run that is watched come before its many samples."""


def router(services: Services) -> APIRouter:
    """Return the routes of this area."""
    live = _Live(services)
    person = Depends(services.auth.browser)
    routes = APIRouter(dependencies=[person])
    open_routes = APIRouter()
    open_routes.get("/live/charts.js")(_script)
    routes.get("/")(live.runs)
    routes.get("/live/table")(live.table)
    routes.get("/compare")(live.compare)
    routes.get("/compare/series")(live.compared_series)
    routes.get("/runs/{name}")(live.run)
    routes.get("/runs/{name}/events")(live.events)
    routes.get("/runs/{name}/series")(live.series)
    routes.get("/runs/{name}/report")(live.download)
    routes.get("/runs/{name}/parts/status")(live.status)
    routes.get("/runs/{name}/parts/samples")(live.samples)
    routes.get("/runs/{name}/parts/log")(live.log)
    routes.get("/runs/{name}/parts/{group}")(live.group)
    changing = APIRouter(dependencies=[Depends(services.auth.form)])
    changing.post("/runs/{name}/stop")(live.stop)
    changing.post("/runs/{name}/resume")(live.resume)
    whole = APIRouter()
    for part in (open_routes, routes, changing):
        whole.include_router(part)
    return whole


def _script() -> Response:
    return Response(report.asset("charts.js"), media_type="text/javascript")


class _Live:
    """The routes, which share what they have read.

    They are plain functions, so that a slow disk blocks only their own thread.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._runs = services.settings.runs
        self._records = Records()
        self._resumed = Resumed(services.settings.data / "live")

    # ---- all runs

    def runs(self, request: Request, page: Page = 0) -> HTMLResponse:
        """Return a page of the table of the runs."""
        states, more = newest_runs(self._runs, page)
        return self._page(request, "runs.html", states=states, page=page, more=more)

    def table(self, request: Request, page: Page = 0) -> HTMLResponse:
        """Return the rows of a page of the table."""
        return self._page(request, "table.html", states=newest_runs(self._runs, page)[0])

    def compare(
        self, request: Request, run: Annotated[list[str] | None, Query()] = None
    ) -> HTMLResponse:
        """Return a page that compares runs."""
        names, records = self._compared(run)
        body = Markup("").join(Markup(part) for part in comparison_page(records) if part)
        return self._page(request, "compare.html", names=names, body=body)

    def compared_series(self, run: Annotated[list[str] | None, Query()] = None) -> JSONResponse:
        """Return the charts of runs that are compared."""
        return JSONResponse(payload(shared_charts(self._compared(run)[1])))

    def _compared(self, run: list[str] | None) -> tuple[list[str], Any]:
        names = list(dict.fromkeys(run or []))
        if not 2 <= len(names) <= MAX_COMPARED:
            raise ServeError(400, f"Select 2 to {MAX_COMPARED} runs to compare, not {len(names)}.")
        return names, named_runs([self._records.of(find_run(self._runs, name)) for name in names])

    # ---- one run

    def run(self, request: Request, name: str) -> HTMLResponse:
        """Return the page of a run."""
        folder = find_run(self._runs, name)
        # Before the files are read: what changes in between is sent again, never missed.
        seen = versions(folder)
        record = self._records.of(folder)
        groups = {title: _marked(report.group_of(record, title)) for title in GROUPS}
        return self._page(
            request,
            "run.html",
            title=record.recipe.name,
            description=record.recipe.description,
            versions="&".join(f"{part}={version}" for part, version in seen.items()),
            groups=groups,
            overview=_marked(report.shown(report.overview, record)),
            stages=[stage.name for stage in record.stages if stage.samples],
            logs=[path.name for path in stages_of(folder) if (path / "log.txt").is_file()],
            found=search(record, words="", stage="", page=0),
            **self._log(name, ""),
            **self._status(name),
        )

    def status(self, request: Request, name: str) -> HTMLResponse:
        """Return what a run is doing, with the buttons."""
        return self._page(request, "status.html", **self._status(name))

    def group(self, name: str, group: str) -> HTMLResponse:
        """Return one group of the report's sections."""
        record = self._records.of(find_run(self._runs, name))
        if group == "Overview":
            return HTMLResponse(report.shown(report.overview, record) or "")
        if group not in GROUPS:
            raise not_found("part", group)
        return HTMLResponse(report.group_of(record, group) or "")

    def series(self, name: str) -> JSONResponse:
        """Return the data of a run's charts."""
        return JSONResponse(report.series_of(self._records.of(find_run(self._runs, name))))

    def download(self, name: str) -> Response:
        """Return the report as a file; nothing is written into the run."""
        record = self._records.of(find_run(self._runs, name))
        text = "<!doctype html>\n" + report.page(record)
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
        headers = {"content-disposition": f'attachment; filename="{safe}-report.html"'}
        return Response(text, media_type="text/html", headers=headers)

    def samples(
        self, request: Request, name: str, *, q: str = "", stage: str = "", page: int = 0
    ) -> HTMLResponse:
        """Return the samples that contain all words."""
        record = self._records.of(find_run(self._runs, name))
        found = search(record, words=q, stage=stage, page=page)
        return self._page(request, "samples.html", name=name, found=found, q=q, stage=stage)

    def log(self, request: Request, name: str, stage: str = "") -> HTMLResponse:
        """Return the end of a stage's log."""
        return self._page(request, "log.html", name=name, **self._log(name, stage))

    def stop(self, name: str) -> Response:
        """Stop a run so that it can be resumed exactly."""
        folder = find_run(self._runs, name)
        self._refuse_jobs(name)
        stop(folder)
        return RedirectResponse(f"/runs/{name}", status_code=303)

    def resume(self, name: str) -> Response:
        """Resume a run where it was stopped."""
        folder = find_run(self._runs, name)
        self._refuse_jobs(name)
        self._resumed.resume(folder)
        return RedirectResponse(f"/runs/{name}", status_code=303)

    async def events(self, request: Request, name: str) -> StreamingResponse:
        """Return a stream of which parts of a run's page have changed."""
        folder = await run_in_threadpool(find_run, self._runs, name)
        # What the page shows is in the address: nothing between page and stream is missed.
        known = {part: request.query_params.get(part, "") for part in PARTS}

        async def stream() -> AsyncIterator[str]:
            seen = known
            yield "retry: 2000\n\n"
            for _ in range(int(STREAM_S / POLL_S)):
                now = await run_in_threadpool(versions, folder)
                if changed := [part for part in PARTS if now[part] != seen[part]]:
                    yield f"event: changed\ndata: {json.dumps(changed)}\n\n"
                    seen = now
                else:
                    yield ": still here\n\n"
                await asyncio.sleep(POLL_S)
                if await request.is_disconnected():
                    return

        return StreamingResponse(stream(), media_type="text/event-stream")

    # ---- parts

    def _page(self, request: Request, template: str, **shown: Any) -> HTMLResponse:
        return self._services.page(
            request, f"live/{template}", clock=duration, percent=_percent, **shown
        )

    def _status(self, name: str) -> dict[str, Any]:
        folder = find_run(self._runs, name)
        record = self._records.of(folder)
        state = state_of(folder)
        return {
            "name": name,
            "state": state,
            "starting": state.state != "running" and self._resumed.starting(name),
            "failed": self._resumed.problem(name),
            "job": self._is_job(name),
            "lacks": _marked(missing(record)) if state.state != "running" else "",
        }

    def _log(self, name: str, stage: str) -> dict[str, Any]:
        found = [p for p in stages_of(find_run(self._runs, name)) if (p / "log.txt").is_file()]
        place = next((path for path in found if path.name == stage), found[-1] if found else None)
        lines: list[str] = []
        if place is not None:
            try:
                with (place / "log.txt").open("rb") as f:
                    f.seek(max(0, f.seek(0, 2) - LOG_BYTES))
                    lines = f.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
            except OSError as error:
                lines = [f"log.txt cannot be read: {error.strerror}"]
        shown = place.name if place is not None else ""
        return {"lines": visible("\n".join(lines)), "logged": shown, "chosen": stage}

    def _is_job(self, name: str) -> bool:
        return (self._services.settings.data / "jobs" / name).is_dir()

    def _refuse_jobs(self, name: str) -> None:
        if self._is_job(name):
            told = "with the fine-tuning API, or stop it on the page of its labels"
            raise ServeError(
                409, f"{name} is a job of the queue. Pause, resume or cancel it {told}."
            )


def _marked(html: str | None) -> Markup:
    """Return markup of the report, which has escaped everything, for a template."""
    return Markup(html or "")


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"
