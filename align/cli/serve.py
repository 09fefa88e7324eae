"""The command ``align serve``: fine-tuning API, live runs and labels in a browser."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from align.cli.options import Runs
from align.core.errors import RecipeError
from align.core.extras import require

# The options of `align serve`, as typer reads them.
Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="NAME=MODEL", help="base model: folder or hub id; repeatable"),
]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        metavar="IDS", help="GPUs for one job, such as 0,1; repeat for several jobs at a time"
    ),
]
Hosts = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="host name of this server; repeatable")
]
JobKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="METHOD.KEY=VALUE",
        help="change the recipes of jobs, such as supervised.max_length=4096; repeatable",
    ),
]
Engine = Annotated[
    Literal["auto", "vllm", "hf"],
    typer.Option(help="engine that generates replies: vLLM or transformers (hf)"),
]
Webhooks = Annotated[
    bool, typer.Option("--private-webhooks", help="allow webhooks to private addresses")
]
NewToken = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="create a token with this name, print it and exit"),
]
RevokeToken = Annotated[
    str | None, typer.Option(metavar="NAME", help="revoke the token with this name and exit")
]
Annotator = Annotated[
    bool, typer.Option("--annotator", help="with --new-token: a token that can only label")
]


def serve(
    runs: Runs = Path("runs"),
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="port to listen on")] = 7860,
    model: Models = None,
    devices: Devices = None,
    allow_host: Hosts = None,
    job_keys: JobKeys = None,
    engine: Engine = "auto",
    private_webhooks: Webhooks = False,
    new_token: NewToken = None,
    revoke_token: RevokeToken = None,
    annotator: Annotator = False,
) -> None:
    """Serve the fine-tuning API, live pages of runs, and the labeling page."""
    needed = ("fastapi", "uvicorn", "jinja2", "python_multipart")
    require("align serve", *needed, extra="serve")
    from align.serve.settings import Settings

    settings = Settings(
        runs=runs,
        host=host,
        port=port,
        models=dict(_named(text) for text in model or ()),
        hosts=tuple(allow_host or ()),
        devices=tuple(devices or ("",)),
        job_keys=tuple(job_keys or ()),
        engine=engine,
        private_webhooks=private_webhooks,
    )
    if annotator and new_token is None:
        raise RecipeError("--annotator has no effect without --new-token NAME")
    if revoke_token is not None:
        from align.serve.app import make_services

        if new_token is not None:
            raise RecipeError("give one of --new-token and --revoke-token")
        make_services(settings).auth.revoke_token(revoke_token)
        return
    if new_token is not None:
        from align.serve.app import make_services

        role = "annotator" if annotator else "admin"
        typer.echo(make_services(settings).auth.new_token(new_token, role))
        return
    from align.serve.main import serve as serve_until_stopped

    serve_until_stopped(settings)


def _named(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and place) and equals:
        raise RecipeError(f"--model {text}: expected NAME=MODEL")
    return (name, place) if equals else (name.rstrip("/").rpartition("/")[2], name)
