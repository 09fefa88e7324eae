"""The GPUs of this machine as the driver lists them, and whether torch agrees; torch-free."""

import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from align.core.errors import DeviceError

DRIVER_OF_CUDA = {"12": 525, "13": 580}
"""First driver branch that runs programs built for a major version of CUDA."""
DEVICE_FILES = ("nvidia[0-9]*", "dxg")
"""Device nodes of NVIDIA cards, the second under WSL."""


def has_gpu() -> bool:
    """Return True if this machine has a GPU that ``CUDA_VISIBLE_DEVICES`` does not hide.

    A container may lack nvidia-smi; its device nodes then tell.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if shutil.which("nvidia-smi") is not None:
        return bool(list_gpus())
    return any(any(Path("/dev").glob(pattern)) for pattern in DEVICE_FILES)


def list_gpus() -> list[str]:
    """Return one line per GPU of nvidia-smi: name, memory, driver version."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False)
    return listed.stdout.strip().splitlines() if listed.returncode == 0 else []


def describe_devices() -> str:
    """Return the GPUs, or that there is none, and the cores: ``CPU, 2 cores``."""
    cores = len(os.sched_getaffinity(0))
    cores_text = f"{cores} core{'s'[: cores != 1]}"
    if not has_gpu():
        return f"CPU, {cores_text}"
    gpus = list_gpus()
    names = ", ".join(dict.fromkeys(map(_gpu_text, gpus))) or "not listed"
    return f"{len(gpus) or 'a'} GPU{'s'[: len(gpus) > 1]} ({names}), {cores_text}"


def _gpu_text(line: str) -> str:
    """Return a GPU's name and memory, from the line of nvidia-smi."""
    name, _, rest = line.partition(",")
    mib = rest.partition(",")[0].split()
    return f"{name}, {int(mib[0]) / 1024:.0f} GiB" if mib and mib[0].isdigit() else name


def require_device(wanted: str) -> None:
    """Raise DeviceError if a recipe's ``device`` is ``gpu`` and no GPU can be used here."""
    if (problem := missing_device(wanted)) is not None:
        raise DeviceError(problem)


def missing_device(wanted: str) -> str | None:
    """Return what is wrong if a recipe's ``device`` is ``gpu`` and no GPU can be used here."""
    if wanted != "gpu" or has_gpu():
        return None
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        reason = f"CUDA_VISIBLE_DEVICES={hidden} hides every GPU"
    elif shutil.which("nvidia-smi") is None:
        reason = "nvidia-smi is not installed, and /dev has no NVIDIA device"
    else:
        reason = "nvidia-smi lists no GPU"
    return f"device: gpu, but no GPU was found: {reason}. Use device: auto to train on the CPU"


def gpu_memory() -> list[tuple[float, float]]:
    """Return the used and the total memory of each GPU in GiB; empty if nvidia-smi does not say."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=False, timeout=5)
    except subprocess.TimeoutExpired:
        return []
    rows = [line.split(",") for line in listed.stdout.splitlines()]
    found = [[cell.strip() for cell in row] for row in rows if len(row) == 2]
    return [
        (int(used) / 1024, int(total) / 1024)
        for used, total in found
        if used.isdigit() and total.isdigit()
    ]


def device_conflict(*, num_seen: int, cuda: str | None) -> str | None:
    """Return why training would run on the wrong device, or None if nothing conflicts.

    Args:
        num_seen: GPUs that torch sees.
        cuda: the CUDA version torch was built for, ``torch.version.cuda``.
    """
    if num_seen and os.environ.get("DS_ACCELERATOR") == "cpu":
        return (
            f"DS_ACCELERATOR=cpu is set, but torch sees {num_seen} GPU(s): DeepSpeed and align "
            "would use different devices. Unset DS_ACCELERATOR to train on the GPU, or set "
            "CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if num_seen or not has_gpu():
        return None
    version = metadata.version("torch")
    if cuda is None:
        return (
            f"this machine has a GPU, but torch {version} is a CPU build. Install the CUDA build "
            "(unset TORCH_INDEX, then: make setup), or set CUDA_VISIBLE_DEVICES= to train on the "
            "CPU"
        )
    # torch was built for CUDA and sees no GPU: usually the driver is older than its CUDA.
    drivers = {line.rsplit(",", 1)[-1].strip() for line in list_gpus()} or {"unknown"}
    needed = DRIVER_OF_CUDA.get(cuda.split(".")[0])
    wants = f"CUDA {cuda} needs driver {needed} or newer" if needed else f"it needs CUDA {cuda}"
    return (
        f"this machine has a GPU (driver {', '.join(sorted(drivers))}), but torch {version} sees "
        f"none: {wants}. Update the driver, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
    )
