"""The application: areas, login, errors and the headers of every answer."""

import fcntl
import logging
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

from anyio import to_thread
from fastapi import FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException

from align import report
from align.core.errors import AlignError, ArtifactError
from align.serve import finetuning, labels, live
from align.serve.auth import COOKIE, ONLY_LABELS, Auth
from align.serve.errors import ServeError, broken_text, full_disk
from align.serve.finetuning.generation import MAX_WAITING
from align.serve.finetuning.graders import MAX_RUNS
from align.serve.guard import Guard
from align.serve.services import Area, Services
from align.serve.settings import Settings
from align.serve.store import Store
from reward_models.field_errors import field_error

log = logging.getLogger(__name__)
AREAS = cast("tuple[Area, ...]", (finetuning, live, labels))
HERE = Path(__file__).parent
API = "/v1/"
THREADS = 40
"""Requests that are worked on at the same time, besides those that wait for a model or grader."""


def create_app(settings: Settings) -> FastAPI:
    """Return the application for these settings; its state is in the runs folder only."""
    services = make_services(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            stack.enter_context(only_server(settings.data))
            stack.callback(services.store.close)
            # Routes run in threads. Those that wait for models and graders leave enough for others.
            to_thread.current_default_thread_limiter().total_tokens = (
                THREADS + MAX_WAITING + MAX_RUNS
            )
            for area in AREAS:
                stack.enter_context(area.background(services))
            yield

    app = FastAPI(title="align", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.services = services
    # Pages look like the report, whose style is therefore theirs too.
    style = Path(report.__file__).with_name("page.css").read_text(encoding="utf-8")
    app.get("/static/report.css")(lambda: Response(style, media_type="text/css"))
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    for area in AREAS:
        app.include_router(area.router(services))
    _add_login(app, services)
    _add_errors(app, services)

    def refuse(error: ServeError, path: str) -> Any:
        request = Request({"type": "http", "path": path, "headers": [], "method": "GET"})
        return _answer(services, request, error)

    app.add_middleware(Guard, settings=settings, refuse=refuse)
    return app


def make_services(settings: Settings) -> Services:
    """Return what the areas share, with the database up to date."""
    store = Store(settings.data)
    auth = Auth(store, settings.data)
    for area in AREAS:
        store.migrate(area.NAME, area.MIGRATIONS)
    loader = FileSystemLoader(HERE / "templates")
    # Everything is escaped: names, prompts and samples come from users and models.
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return Services(settings, store, auth, Jinja2Templates(env=env))


@contextmanager
def only_server(folder: Path) -> Iterator[None]:
    """Refuse a second server of the same runs: each would start the same jobs."""
    with (folder / "server.lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                f"{folder}: another 'align serve' uses these runs. Stop it or use --runs."
            ) from None
        yield


# ---- login


def _add_login(app: FastAPI, services: Services) -> None:
    @app.get("/login")
    def login(request: Request, code: str = "") -> Response:
        if not code:
            return services.page(request, "login.html")
        return _welcome(services, request, code=code)

    @app.post("/login")
    def login_by_token(request: Request, token: Annotated[str, Form()] = "") -> Response:
        return _welcome(services, request, token=token)

    @app.post("/logout")
    async def logout(request: Request) -> Response:
        await services.auth.labeler_form(request)
        response = RedirectResponse("/login", status_code=303)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response


def _welcome(services: Services, request: Request, *, code: str = "", token: str = "") -> Response:
    # A page, not a redirect: a browser that follows a link from elsewhere would not send the
    # SameSite=Strict cookie along with the redirect.
    response = services.page(request, "welcome.html")
    try:
        services.auth.log_in(request, response, code=code, token=token)
    except ServeError as error:
        return services.page(request, "login.html", status=error.status, problem=str(error))
    return response


# ---- errors


def _add_errors(app: FastAPI, services: Services) -> None:
    @app.exception_handler(ServeError)
    async def refused(request: Request, error: ServeError) -> Response:
        return _answer(services, request, error)

    @app.exception_handler(AlignError)
    async def user_error(request: Request, error: AlignError) -> Response:
        return _answer(services, request, ServeError(400, str(error)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        found = ServeError(error.status_code, message, headers=dict(error.headers or {}))
        return _answer(services, request, found)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _answer(services, request, _wrong_field(error))

    @app.exception_handler(UnicodeEncodeError)
    async def not_utf8(request: Request, error: UnicodeEncodeError) -> Response:
        # Only the JSON of a body has such texts; without one, a file's name on the disk does.
        if request.method == "GET":
            return await failed(request, error)
        return _answer(services, request, broken_text())

    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.Error)
    async def of_the_disk(request: Request, error: Exception) -> Response:
        problem = full_disk(error)
        if problem is None:
            return await failed(request, error)
        log.error("%s %s: %s", request.method, request.url.path, error)
        return _answer(services, request, problem)

    @app.exception_handler(Exception)
    async def failed(request: Request, _error: Exception) -> Response:
        log.exception("%s %s failed", request.method, request.url.path)
        problem = ServeError(500, "The server failed; its log has the traceback.")
        return _answer(services, request, problem)


def _wrong_field(error: RequestValidationError) -> ServeError:
    """Return the error that names the wrong field of a request."""
    errors = [{**found, "loc": found["loc"][1:]} for found in error.errors()]
    if not isinstance(error.body, dict):  # a query, a form, or no JSON
        place, told = errors[0]["loc"], errors[0]["msg"]
    else:
        place, told = field_error(errors, error.body)
        if not place and told.partition(":")[0] in error.body:  # about several fields
            return ServeError(400, told, param=told.partition(":")[0])
    param = ".".join(map(str, place))
    return ServeError(400, f"{param or 'body'}: {told}", param=param or None)


def _answer(services: Services, request: Request, error: ServeError) -> Response:
    """Return an error as OpenAI's object below /v1, elsewhere as a page."""
    if f"{request.url.path}/".startswith(API):
        return JSONResponse(error.body(), error.status, headers=error.headers)
    if error.status == 401 and request.method == "GET" and "hx-request" not in request.headers:
        return RedirectResponse("/login", status_code=303)
    if error.code == ONLY_LABELS and request.url.path == "/":  # where a login leads
        return RedirectResponse("/labels", status_code=303)
    page: HTMLResponse = services.page(
        request, "error.html", status=error.status, message=str(error)
    )
    page.headers.update(error.headers)
    return page
