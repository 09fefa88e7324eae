"""The fine-tuning API of OpenAI on recipes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Depends, Request

from align.serve.auth import Person
from align.serve.finetuning.chat import add_chat
from align.serve.finetuning.common import Api, RateLimit
from align.serve.finetuning.files import Files, add_files
from align.serve.finetuning.generation import Generators
from align.serve.finetuning.graders import add_graders
from align.serve.finetuning.jobs import add_details, add_jobs, add_steering
from align.serve.finetuning.models import add_models
from align.serve.finetuning.permissions import add_permissions
from align.serve.finetuning.queue import Queue
from align.serve.finetuning.tables import MIGRATIONS
from align.serve.finetuning.uploads import add_uploads
from align.serve.finetuning.webhooks import add_webhooks
from align.serve.services import Services

__all__ = ["MIGRATIONS", "NAME", "background", "router"]
NAME = "finetuning"


def router(services: Services) -> APIRouter:
    """Return the routes of this area."""
    api = _api(services)
    routes = APIRouter(prefix="/v1")
    for add in (
        *(add_files, add_uploads, add_jobs, add_steering, add_details, add_permissions),
        *(add_graders, add_models, add_chat, add_webhooks),
    ):
        add(routes, api)
    return routes


@contextmanager
def background(services: Services) -> Iterator[None]:
    """Run the queue while the server runs; then end the models' processes."""
    api = _api(services)
    try:
        with Queue(api).running():
            yield
    finally:
        api.generators.close()


def _api(services: Services) -> Api:
    """Return the parts of the API, which are made once for each server."""
    if NAME not in services.parts:
        limit = RateLimit(services.settings.requests_per_minute)

        # In the event loop: looking a token up takes less time than a thread to do it.
        async def sender(request: Request) -> Person:
            person = services.auth.bearer(request)
            limit.take(person)
            return person

        services.parts[NAME] = Api(
            services=services,
            files=Files(services.settings.data),
            generators=Generators(services.settings, services.store),
            wake=threading.Event(),
            me=Depends(sender),
        )
    found: Any = services.parts[NAME]
    return found
