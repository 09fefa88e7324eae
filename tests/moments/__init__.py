"""Signals that hit a process at an exact file operation, however fast or slow the machine is.

A process that starts with the environment of one of these functions acts the first time that it
makes, or opens for writing, a path that contains a text. Once the mark exists, none acts again.
"""

import signal
from pathlib import Path

HOOK = Path(__file__).parent / "hook"


def signal_at(text: str, signum: int, mark: Path) -> dict[str, str]:
    """Return the environment of a process that makes ``mark`` and signals its group then."""
    return _environment(text, signal.Signals(signum).name, mark)


def wait_at(text: str, mark: Path) -> dict[str, str]:
    """Return the environment of a process that makes ``mark`` then and waits for SIGTERM."""
    return _environment(text, "wait", mark)


def _environment(text: str, action: str, mark: Path) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {
        "PYTHONPATH": f"{HOOK}:{root}",
        "ALIGN_TEST_AT": text,
        "ALIGN_TEST_ACTION": action,
        "ALIGN_TEST_MARK": str(mark),
    }
