"""Turn a script of launch/ into a stage process. Nothing heavy is imported here."""

import os
import sys
from typing import NoReturn


def become(module: str, *words: str) -> NoReturn:
    """Replace this process with ``python -m MODULE WORDS ARGUMENTS`` under the same process id.

    Python puts a script's folder first on the module search path, and launch/ contains scripts
    named ``trl`` and ``evaluate``. ``-P`` keeps that folder and the working directory off the path.
    """
    argv = [sys.executable, "-u", "-P", "-m", module, *words, *sys.argv[1:]]
    os.execv(sys.executable, argv)
