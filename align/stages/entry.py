"""How a script of launch/ becomes a stage. Nothing heavy is imported here."""

import os
import sys
from typing import NoReturn


def become(module: str, *words: str) -> NoReturn:
    """Replace this process by ``python -m MODULE WORDS ARGUMENTS``, in which it keeps its id.

    Python puts a script's folder first where it looks for modules, and in launch/ ``trl`` and
    ``evaluate`` are scripts. A module is started without it (``-P``), nor the working directory.
    """
    argv = [sys.executable, "-u", "-P", "-m", module, *words, *sys.argv[1:]]
    os.execv(sys.executable, argv)
