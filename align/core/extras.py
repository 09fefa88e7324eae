"""Packages that an installation may lack: the light core runs without torch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from align.core.errors import InstallError

TRAINING = ("torch", "transformers", "deepspeed", "datasets", "peft", "accelerate", "safetensors")
"""Modules without which no stage starts; the extra ``train`` installs them."""


def require(what: str, *modules: str, extra: str = "train") -> None:
    """Raise unless all modules are installed; they are not imported.

    Args:
        what: what needs them, for the message.
        modules: names of modules.
        extra: the extra of align-suite that installs them.

    Raises:
        InstallError: names the missing modules and the command that installs them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InstallError(
            f"{what} needs {', '.join(missing)}, which this installation lacks. Run: "
            f"pip install 'align-suite[{extra}]'"
        )


@contextmanager
def as_if_absent(module: str) -> Iterator[None]:
    """Make ``import module`` raise ImportError inside the block, unless it was imported before.

    Some libraries import a heavy optional dependency whenever it is installed.
    """
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # Python's sign for "no such module"
    try:
        yield
    finally:
        del sys.modules[module]
