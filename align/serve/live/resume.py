"""Run the rest of a run from its own recipe: ``python -m align.serve.live.resume FOLDER``."""

import sys
from pathlib import Path

from align.core.errors import AlignError
from align.core.text import visible
from align.pipeline.running import run
from align.report.read import read_run


def main(folder: Path) -> int:
    """Run the stages that are not done, as ``align run`` of the same recipe does."""
    try:
        return run(read_run(folder).recipe, run_dir=folder)
    except AlignError as error:
        sys.stderr.write(visible(f"{error}\n"))
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
