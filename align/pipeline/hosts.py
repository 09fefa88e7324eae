"""Machines of a hostfile, and the ssh command that starts the helper of a run on each of them."""

import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import DeviceError
from align.core.seats import CONTROL_PORT, Seat, int_of
from align.pipeline.processes import free_port

SSH = "ALIGN_SSH"
"""Environment variable with the ssh command and its options."""
FORWARDED = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHON", "ALIGN_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_"),
    *("TOKENIZERS_", "NCCL_", "GLOO_", "TORCH_", "UCX_", "FI_", "OMP_", "MKL_", "ONEDNN_"),
    *("ATEN_", "DEEPSPEED_", "DS_", "VLLM_", "TRITON_", "CUBLAS_", "CUDA_HOME", "WANDB_"),
    *("MLFLOW_", "SWANLAB_", "OPENAI_", "XDG_CACHE_HOME", "SOURCE_DATE_EPOCH"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
"""Starts of the names of environment variables that the other machines get too."""
KEPT_HERE = ("ALIGN_PARENT", "VLLM_HOST_IP")
"""Variables with such a name that mean something on this machine only."""
_LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")


@dataclass(frozen=True, slots=True)
class Host:
    """One machine of a hostfile and how many ranks it runs."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Return the machines of a file in DeepSpeed's format: ``name slots=8``, one per line.

    Raises:
        DeviceError: the file or a line cannot be read, or the first machine is not this one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"{path}: cannot be read ({error})") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        # A name that starts with a dash would be an option of ssh.
        if found is None or int(found[2]) < 1 or found[1].startswith("-"):
            raise DeviceError(
                f"{path}:{number}: '{text}' is not a host. Expected a name or address and the "
                "number of its ranks, such as: node1 slots=8"
            )
        if any(host.name == found[1] for host in hosts):
            raise DeviceError(f"{path}:{number}: host {found[1]} is listed twice. Add its slots")
        hosts.append(Host(found[1], int(found[2])))
    if not hosts:
        raise DeviceError(f"{path}: no host. Write one per line, such as: node1 slots=8")
    if not _is_here(hosts[0].name):
        raise DeviceError(
            f"{path}: the first host, {hosts[0].name}, is not this machine "
            f"({socket.gethostname()}). Run the command there, or put this machine first"
        )
    return hosts


def _is_here(name: str) -> bool:
    """Return whether a name is this machine's: only its own addresses can be listened on."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError as error:
        raise DeviceError(f"host {name} of the hostfile is unknown ({error.strerror})") from None
    for family, kind, proto, _, address in found:
        with socket.socket(family, kind, proto) as s:
            try:
                s.bind(address)
            except OSError:
                continue
            return True
    return False


def seat_of_hosts(hosts: Sequence[Host]) -> Seat:
    """Return the place of this process, which is the first of the hosts."""
    return Seat(
        "ssh",
        rank=0,
        world=sum(host.slots for host in hosts),
        local_rank=0,
        local_world=hosts[0].slots,
        address=hosts[0].name,
        port=int_of(os.environ, CONTROL_PORT, free_port()),
        key=secrets.token_hex(16),
        count=hosts[0].slots,
    )


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the ranks of other machines get."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(FORWARDED) and name not in KEPT_HERE
    }


class Remote:
    """The helper of a run on another machine, started over ssh."""

    def __init__(self, host: Host, seat: Mapping[str, Any]) -> None:
        """Start it; what it says goes to a file of this process.

        Args:
            host: the machine.
            seat: what the helper needs to know, as JSON values.

        Raises:
            DeviceError: there is no ssh here.
        """
        self.host = host
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        # Values may be secret, and a command line is visible to everyone, so they go to its input.
        words = {"env": forwarded(os.environ), "seat": dict(seat)}
        argv = [*shlex.split(os.environ.get(SSH, "ssh -o BatchMode=yes -o ConnectTimeout=30"))]
        argv += [host.name, remote_command()]
        try:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=self._said, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise DeviceError(f"{argv[0]}: {error.strerror}. Install ssh, or set {SSH}") from None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            self._process.stdin.close()
        except BrokenPipeError:  # it has ended; its message is read later
            pass

    def problem(self) -> str | None:
        """Return why the helper has ended, None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._said.seek(0)
        text = self._said.read().decode(errors="replace").strip()
        return f"{self.host.name}: exit code {code}: {' '.join(text.split())[-400:] or 'no output'}"

    def close(self) -> None:
        """Wait up to 10 s for the helper to end, then end the connection."""
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._said.close()


def remote_command() -> str:
    """Return the shell command of the helper: this Python and this code, in this folder."""
    argv: Sequence[str] = (sys.executable, "-P", "-m", "align.pipeline.follow")
    path = shlex.quote(os.environ.get("PYTHONPATH", ""))
    return f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={path} exec {shlex.join(argv)}"
