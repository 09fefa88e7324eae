"""Start a server and print how to reach it."""

import logging

import uvicorn

from align.core.log import setup_logging
from align.serve.app import create_app
from align.serve.finetuning.recipes import base_place
from align.serve.settings import Settings, own_address

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_CONNECTIONS = 512
"""Largest number of connections; others get 503."""


def serve(settings: Settings) -> None:
    """Serve until a signal stops the server.

    Raises:
        AlignError: the server cannot start, for the reason in the message.
    """
    setup_logging(0)
    for name, place in settings.models.items():
        base_place(name, place, settings.runs)
    app = create_app(settings)
    address = own_address(settings)
    if settings.host not in LOOPBACK:
        log.warning(
            "listening on %s without encryption: put a proxy with TLS in front of it",
            settings.host,
        )
    log.info("fine-tuning API at %s/v1, for tokens of align serve --new-token", address)
    log.info(
        "log in once, within an hour, at %s/login?code=%s",
        address,
        app.state.services.auth.login_code(),
    )
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        workers=1,
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
