"""Start a server and print how to reach it."""

import logging
import socket

import uvicorn

from align.core.errors import ArtifactError, InstallError
from align.core.extras import TRAINING, require
from align.core.log import setup_logging
from align.serve.app import create_app, only_server
from align.serve.finetuning.recipes import base_place, check_changes
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
    try:
        require("the fine-tuning API", *TRAINING, extra="serve")
    except InstallError as error:  # people can label, and look at runs
        log.warning("%s", error)
    for name, place in settings.models.items():
        base_place(name, place, settings.runs)
    check_changes(settings.job_keys)
    app = create_app(settings)
    # uvicorn would log these with a traceback.
    with only_server(settings.data):
        _check_port(settings)
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


def _check_port(settings: Settings) -> None:
    """Raise if the address cannot be listened on."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((settings.host, settings.port))
    except OSError as error:
        raise ArtifactError(
            f"{settings.host} port {settings.port}: {error.strerror or error}. Use another --port "
            "or --host, or stop what listens there."
        ) from None
