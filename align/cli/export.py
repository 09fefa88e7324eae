"""The commands ``align export`` and ``align push``: a model for other tools and people."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ExportFormat(StrEnum):
    """What to write."""

    MODEL = "model"
    ADAPTER = "adapter"
    GGUF = "gguf"


def export(
    reference: Annotated[
        Path, typer.Argument(metavar="RUN/STAGE", help="or a model folder: runs/quickstart/dpo")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to create")],
    format_: Annotated[
        ExportFormat, typer.Option("--format", help="safetensors, the adapter alone, or GGUF")
    ] = ExportFormat.MODEL,
    dtype: Annotated[
        str | None,
        typer.Option(help="model: bfloat16, float16, float32; gguf: f16, q8_0, q4_k_m"),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="name of an adapter's base model, such as a hub id")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="rows with prompts to compare on")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="replace an earlier export in OUT")
    ] = False,
) -> None:
    """Export a model for vLLM, llama.cpp or Ollama, and verify it against the original."""
    from align.pipeline.processes import run_tool

    os.environ.setdefault("TQDM_DISABLE", "1")
    options = ["--format", format_.value]
    for name, value in (("--dtype", dtype), ("--base", base), ("--prompts", prompts)):
        options += [] if value is None else [name, str(value)]
    options += ["--force"] if force else []
    raise typer.Exit(run_tool("export", [str(reference), str(out), *options]))


def push(
    reference: Annotated[
        Path, typer.Argument(metavar="RUN/STAGE", help="or an export, or a model folder")
    ],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="repository on the hub")],
    private: Annotated[bool, typer.Option("--private", help="if the repository is new")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="default: main")] = None,
    message: Annotated[str, typer.Option(help="commit message")] = "Upload by align push",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the files and sizes, and upload nothing")
    ] = False,
) -> None:
    """Upload a model with its card to the Hugging Face Hub."""
    from align.pipeline.processes import run_tool

    options = ["--message", message]
    options += [] if revision is None else ["--revision", revision]
    options += ["--private"] if private else []
    options += ["--dry-run"] if dry_run else []
    raise typer.Exit(run_tool("push", [str(reference), repo, *options]))
