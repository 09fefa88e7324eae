"""One side of a comparison as a process: ``python -m benchmarks.side MODULE:FUNCTION JSON``."""

import importlib
import json
import os
import sys
from pathlib import Path

from benchmarks.gate import Gate


def main() -> None:
    """Call ``FUNCTION(gate, work)``, which trains until the gate ends the process."""
    module, _, function = sys.argv[1].partition(":")
    work = json.loads(sys.argv[2])
    gate = Gate()
    os.chdir(Path(work["out"]))
    getattr(importlib.import_module(module), function)(gate, work)


if __name__ == "__main__":
    main()
