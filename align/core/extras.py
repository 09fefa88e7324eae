"""Packages that an installation may lack or not need: the light core runs without torch."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

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


@contextmanager
def called_later(module: str, function: str) -> Iterator[None]:
    """Make ``from module import function`` import the module only when the function is called.

    Some libraries import a heavy module for a function that is rarely called. Anything else that is
    imported from the module inside the block is the module's own.
    """
    if module in sys.modules:
        yield
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), function)(*args, **kwargs)

    def other(name: str) -> Any:
        if name.startswith("__"):  # the import system asks for its own marks
            raise AttributeError(name)
        if sys.modules.get(module) is light:
            del sys.modules[module]
        return getattr(import_module(module), name)

    light = ModuleType(module)
    light.__dict__.update({function: call, "__getattr__": other})
    sys.modules[module] = light
    try:
        yield
    finally:
        if sys.modules.get(module) is light:
            del sys.modules[module]


@contextmanager
def without_collections() -> Iterator[None]:
    """Import without the garbage collector.

    Libraries make a million objects that stay, and each collection would look at all of them: a
    fifth of the CPU time of an online stage's imports.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
