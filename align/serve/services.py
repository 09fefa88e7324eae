"""What the areas of the server share."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from fastapi.templating import Jinja2Templates

from align.serve.auth import Auth
from align.serve.settings import Settings
from align.serve.store import Store


@dataclass(frozen=True, slots=True)
class Services:
    """What an area receives.

    Attributes:
        settings: of the server.
        store: the database.
        auth: dependencies that return the sender of a request.
        templates: of ``align/serve/templates``, with escaping.
        parts: what an area shares between its router and its background, by its name.
    """

    settings: Settings
    store: Store
    auth: Auth
    templates: Jinja2Templates
    parts: dict[str, Any] = field(default_factory=dict)

    def page(
        self, request: Request, name: str, /, status: int = 200, **shown: object
    ) -> HTMLResponse:
        """Return a page or a fragment.

        Args:
            request: it decides whose CSRF token the page's forms hold.
            name: of the template, such as ``live/run.html``.
            status: of the response.
            shown: what the template shows, besides ``person`` (None if nobody is logged in).
        """
        context = {"person": self.auth.session(request), **shown}
        return self.templates.TemplateResponse(request, name, context, status_code=status)


class Area(Protocol):
    """A module that is one area of the server."""

    NAME: str
    MIGRATIONS: tuple[str, ...]

    router: Callable[[Services], APIRouter]
    background: Callable[[Services], AbstractContextManager[None]]
    """What runs while the server does, such as a thread."""
