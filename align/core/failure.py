"""What a command prints about an unexpected error."""

import errno
import tempfile
import traceback
from pathlib import Path

from align.core.storage import storage_problem
from align.core.text import visible

_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT)


def path_problem(error: Exception) -> str | None:
    """Return one line for a path that cannot exist, or does not; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in _PATHS or not error.filename:
        return None
    return visible(f"{error.filename}: {error.strerror}. Correct the path, and try again")


def last_words(error: Exception) -> str:
    """Return one line for an unexpected error; its traceback goes to a file."""
    place = Path(str(getattr(error, "filename", None) or "."))
    if isinstance(error, OSError) and (problem := storage_problem(error, place)) is not None:
        return visible(problem)
    # A file keeps the traceback for a report; the terminal gets one line.
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="align-failure-", suffix=".txt", delete=False, errors="backslashreplace"
        ) as f:
            f.write(visible(text))
    # No place for the file: print the traceback instead.
    except OSError:
        return visible(text)
    told = " ".join(str(error).split())[:300]
    return visible(
        f"align failed: {type(error).__name__}: {told}; this is a bug in align. The traceback "
        f"is in {f.name}; 'align doctor --report' writes what a bug report needs"
    )
