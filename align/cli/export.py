"""The commands ``align export`` and ``align push``: a model for other tools and people."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import MODEL_HELP, Runs


class Verify(StrEnum):
    """Who reads the export and must respond as the source."""

    AUTO = "auto"
    TRANSFORMERS = "transformers"
    VLLM = "vllm"
    LLAMA_CPP = "llama.cpp"


class ExportFormat(StrEnum):
    """What to write."""

    MODEL = "model"
    ADAPTER = "adapter"
    GGUF = "gguf"


def export(
    reference: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
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
        Path | None,
        typer.Option(metavar="FILE", help="rows whose prompts are used for the comparison"),
    ] = None,
    verify: Annotated[
        Verify,
        typer.Option(
            help="what loads the export and must agree; auto: also vLLM or llama.cpp if possible"
        ),
    ] = Verify.AUTO,
    force: Annotated[
        bool,
        typer.Option("--force", help="replace an earlier, unedited export in OUT"),
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Export a model for vLLM, llama.cpp or Ollama, and verify it against the original."""
    from align.pipeline.processes import run_tool

    os.environ.setdefault("TQDM_DISABLE", "1")
    options = ["--format", format_.value, "--verify", verify.value, "--runs", str(runs)]
    for name, value in (("--dtype", dtype), ("--base", base), ("--prompts", prompts)):
        options += [] if value is None else [name, str(value)]
    options += ["--force"] if force else []
    raise typer.Exit(run_tool("export", [reference, str(out), *options]))


def push(
    reference: Annotated[
        str, typer.Argument(metavar="MODEL", help="RUN/STAGE, a folder, an export or a hub id")
    ],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="repository on the hub")],
    private: Annotated[
        bool, typer.Option("--private", help="make a new repository private")
    ] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="default: main")] = None,
    message: Annotated[str, typer.Option(help="commit message")] = "Upload by align push",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list the files with their sizes, and upload nothing")
    ] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Upload a model with its card to the Hugging Face Hub."""
    from align.pipeline.processes import run_tool

    options = ["--message", message, "--runs", str(runs)]
    options += [] if revision is None else ["--revision", revision]
    options += ["--private"] if private else []
    options += ["--dry-run"] if dry_run else []
    raise typer.Exit(run_tool("push", [reference, repo, *options]))
