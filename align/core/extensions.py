"""DeepSpeed's compiled kernels: where they are built, and what a killed process leaves behind.

DeepSpeed compiles its CPU Adam with torch's JIT, which guards each build with a lock file. A killed
build leaves the lock, and every later process would wait for it forever.
"""

import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from align.core.storage import user_caches

log = logging.getLogger(__name__)
IDLE_S = 600.0
"""A lock in a folder shared with other machines is stale after this time without a change."""
SAY_EVERY_S = 60.0
SHARED_MEMORY = Path("/dev/shm")
SEGMENTS = "deepspeed_allreduce_buffer_*"
"""Memory of DeepSpeed's op for inference on CPU; names continue with uid, address, port, rank."""


@cache
def build_folder() -> Path:
    """Return the folder for compiled kernels: of this environment, machine and toolchain."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    version = ""
    if compiler is not None:
        # Another compiler may produce incompatible objects, so its version is part of the key.
        asked = [compiler, "-dumpfullversion", "-dumpversion"]
        version = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    packages = [f"{name}={_version(name)}" for name in ("torch", "deepspeed")]
    # The kernels are built for the processor at hand, and their locks name no machine.
    parts = [platform.node(), _processor(), platform.python_version(), version, *packages]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    # Beside the environment that they were built for; a system-wide one is not writable.
    home = Path(sys.prefix)
    if not os.access(home, os.W_OK):
        home = user_caches()
    return home / "align-extensions" / key


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("flags")), platform.machine())


def extensions_folder() -> Path:
    """Return the folder that torch builds in: ``TORCH_EXTENSIONS_DIR`` if set, else our own."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or build_folder())


def prepare() -> None:
    """Choose the build folder and remove what killed processes left; log every removal."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(build_folder()))
    _remove_stale_locks()
    for segment in stale_segments():
        log.warning("%s: shared memory of a process that is gone; removed", segment)
        segment.unlink(missing_ok=True)


def announce_build(name: str) -> None:
    """Log that DeepSpeed is about to compile a kernel, unless it is there from before."""
    if not (extensions_folder() / name / f"{name}.so").is_file():
        log.info("compiling DeepSpeed's kernel %s, once, about 1 min", name)


def wait_for_builds() -> None:
    """Wait until no process compiles; torch would wait silently, even for a dead process."""
    said = -math.inf
    while True:
        _remove_stale_locks()
        locks = _locks()
        if not locks:
            return
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            names = ", ".join(map(str, locks))
            log.info("waiting for another process that compiles a kernel (%s)", names)
        time.sleep(0.5)


def _remove_stale_locks() -> None:
    for lock in stale_locks():
        log.warning("%s: lock of a build that was killed; removed", lock)
        lock.unlink(missing_ok=True)


def _locks() -> list[Path]:
    return sorted(extensions_folder().glob("**/lock"))


def stale_locks() -> list[Path]:
    """Return the locks of builds that were killed.

    A build holds its lock open, so a lock that no process has open is stale. In a folder that
    other machines may share it must also be idle.
    """
    found = _locks()
    if not found:
        return []
    held = set(_open_files())
    own = extensions_folder() == build_folder()
    return [lock for lock in found if str(lock.resolve()) not in held and (own or _idle(lock))]


def _idle(lock: Path) -> bool:
    changed = max((path.stat().st_mtime for path in lock.parent.iterdir()), default=0.0)
    return time.time() - changed > IDLE_S


def stale_segments() -> list[Path]:
    """Return this user's shared memory of DeepSpeed that no process has mapped."""
    found = [p for p in SHARED_MEMORY.glob(SEGMENTS) if p.stat().st_uid == os.getuid()]
    if not found:
        return []
    # DeepSpeed never removes the segment of a killed process, and it fills /dev/shm.
    mapped = "".join(_memory_maps())
    return [path for path in found if str(path) not in mapped]


def _open_files() -> Iterator[str]:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield os.readlink(link)
        except OSError:  # the process has ended, or belongs to someone else
            continue


def _memory_maps() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            yield path.read_text(encoding="utf-8", errors="replace")
        except OSError:  # the process has ended, or belongs to someone else
            continue
