"""Full disks: wait for space while weights are saved, and say in one line why writing failed."""

import errno
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from align.core.errors import AlignError, Preempted

T = TypeVar("T")
log = logging.getLogger(__name__)

_NUMBERS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the device reports an input/output error",
    errno.EFBIG: "a file would be larger than the limit on file sizes (ulimit -f)",
    errno.EACCES: "writing is not permitted",
}
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
_WRITERS = ("inline_container", "PytorchStreamWriter", "unexpected pos")
"""Parts of the messages of torch's file writer, which does not report why a write failed."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
MIB = 2**20
FEW_INODES = 32
"""Fewer free inodes than the files of one checkpoint."""
WAIT = "ALIGN_DISK_WAIT_S"
"""Environment variable with the seconds that saving weights waits for space."""
WAIT_S = 600.0
POLL_S = 1.0


def user_caches() -> Path:
    """Return the folder of this user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def write_patiently(
    write: Callable[[], T], *, folder: Path, needed: int, stop: Callable[[], bool]
) -> T:
    """Return the result of ``write``; while the disk is full, wait for space and write again.

    Args:
        write: writes below the folder; it can be repeated.
        folder: of the stage or checkpoint. needed: bytes that it writes, about.
        stop: returns whether the process was asked to stop, which ends the waiting.

    Raises:
        Preempted: asked to stop while waiting.
        Exception: the error of ``write`` when no space was freed in time, or any other error.
    """
    deadline, told = time.monotonic() + wait_s(), False
    while True:
        try:
            return write()
        # Writers raise errors of several libraries; errors other than a full disk are raised again.
        except Exception as error:
            if not _is_full(error) or time.monotonic() >= deadline:
                raise
            if not told:
                log.warning("%s", _waiting_line(folder, needed, deadline - time.monotonic()))
                told = True
        while True:
            if stop():
                raise Preempted(
                    f"{folder}: stopped by a signal while waiting for space. The last checkpoint "
                    "is whole; run the same command again to resume"
                )
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
            # One more try after the deadline; its error is the stage's.
            if free_bytes(folder) >= needed or time.monotonic() >= deadline:
                break


def wait_s() -> float:
    """Return the seconds that saving weights waits for space."""
    try:
        return max(0.0, float(os.environ[WAIT]))
    except (KeyError, ValueError):
        return WAIT_S


def free_bytes(folder: Path) -> int:
    """Return the space that this user may still use on the device of a folder."""
    state = os.statvfs(_existing(folder))
    return state.f_bavail * state.f_frsize


def _is_full(error: Exception) -> bool:
    number = _number_of(error)
    if number is None:
        # torch's writer does not say why; a limit on file sizes does not go away by waiting.
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        return limit == resource.RLIM_INFINITY and any(word in str(error) for word in _WRITERS)
    return number in _FULL


def _waiting_line(folder: Path, needed: int, seconds: float) -> str:
    return (
        f"{folder}: no space left on {device_of(folder)} ({free_bytes(folder) // MIB:,} "
        f"MiB free; needs about {-(-needed // MIB):,} MiB). Free space within {seconds:.0f} s, and "
        "the stage continues. Nothing that was saved is lost"
    )


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Name the folder in errors of the system that have no path, such as those of failed writes."""
    try:
        yield
    except AlignError:
        raise
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise


def storage_problem(error: BaseException, folder: Path) -> str | None:
    """Return one line for an error of writing below ``folder``; None for any other error."""
    number = _number_of(error)
    if number in _IN_THE_WAY and isinstance(error, OSError) and error.filename is not None:
        name = error.filename2 or error.filename
        return f"{name}: found a folder in the place of a file, or a file in that of a folder. " + (
            "Nothing was removed. Move it away and run the same command again"
        )
    writer = any(word in str(error) for word in _WRITERS)
    if number not in _NUMBERS and not writer:
        return None
    # The folder itself may not exist yet, so inspect its nearest parent.
    place = _existing(folder)
    state = os.statvfs(place)
    free = state.f_bavail * state.f_frsize
    # torch's writer gives no errno: a file size limit, if set, is the likelier reason.
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if number in _NUMBERS:
        reason = _NUMBERS[number]
    elif limit != resource.RLIM_INFINITY:
        reason = _NUMBERS[errno.EFBIG]
    else:
        reason = _NUMBERS[errno.ENOSPC]
    # The failed write has freed its own inode again, so few left count as none.
    if number == errno.ENOSPC and state.f_files and state.f_favail < FEW_INODES:
        reason = "no inodes left"
    needed = _largest_mib(folder)
    wanted = f"; a checkpoint of this stage needs about {needed} MiB" if needed else ""
    return (
        f"{folder}: {reason} on {device_of(place)} ({free // MIB} MiB free{wanted}). Nothing that "
        "was saved is lost. Free space or fix the permissions, and run the same command again"
    )


def _number_of(error: BaseException | None) -> int | None:
    """Return the errno of an error or of its cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        # Libraries in Rust and C++ raise their own types with the system's text.
        found = next((n for n in _NUMBERS if os.strerror(n) in str(error)), None)
        if found is not None:
            return found
        error = error.__cause__ or error.__context__
    return None


def _existing(folder: Path) -> Path:
    # Unlike Path.exists, False if this user may not look into the folder above.
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def device_of(place: Path) -> str:
    """Return the device and mount point of a path."""
    point = _existing(place).resolve()
    while not os.path.ismount(point) and point != point.parent:
        point = point.parent
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        lines = []
    device = next((line.split()[0] for line in lines if line.split()[1] == str(point)), "")
    return f"{device} at {point}" if device else str(point)


def _largest_mib(folder: Path) -> int:
    """Return the size of the largest checkpoint, complete or not, below a stage's folder."""
    sizes = [0]
    # A folder of another user cannot be listed; a file may vanish while it is counted.
    with suppress(OSError):
        for checkpoint in folder.glob("checkpoints/*"):
            with suppress(OSError):
                sizes.append(sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()))
    return -(-max(sizes) // MIB)
