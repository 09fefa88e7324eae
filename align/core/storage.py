"""Explain in one line why nothing more can be written, for errors of Python and torch."""

import errno
import os
import resource
from pathlib import Path

_NUMBERS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "a file would be larger than the limit on file sizes (ulimit -f)",
    errno.EACCES: "writing is not permitted",
}
_WRITERS = ("inline_container", "PytorchStreamWriter", "unexpected pos")
"""Parts of the messages of torch's file writer, which does not report why a write failed."""
MIB = 2**20


def storage_problem(error: BaseException, folder: Path) -> str | None:
    """Return one line for an error of writing below ``folder``; None for any other error."""
    number = _number_of(error)
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
    if number == errno.ENOSPC and state.f_files and not state.f_favail:
        reason = "no inodes left"
    needed = _largest_mib(folder)
    wanted = f"; a checkpoint of this stage needs about {needed} MiB" if needed else ""
    return (
        f"{folder}: {reason} on {_device(place)} ({free // MIB} MiB free{wanted}). Nothing that "
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
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _device(place: Path) -> str:
    """Return the device and mount point of a path."""
    point = place.resolve()
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
    for checkpoint in folder.glob("checkpoints/*"):
        try:
            sizes.append(sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()))
        except OSError:
            continue
    return -(-max(sizes) // MIB)
