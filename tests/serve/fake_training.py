"""Stand in for ``align run`` of a recipe on labels, without a model.

Usage: python fake_training.py RECIPE --runs DIR. A seed of 0 ends well, 1 waits for SIGTERM, and
2 fails with a message unless the file ``mended`` exists.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

from align.recipe.load import load_recipe


def main() -> None:
    """Make the folder of the run and record what was read."""
    recipe = load_recipe(sys.argv[1])
    run = Path(sys.argv[sys.argv.index("--runs") + 1]) / recipe.name
    if (run.with_name("mine") / "dpo").is_dir():  # a run like it, so that they can be compared
        shutil.copytree(run.with_name("mine"), run, dirs_exist_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    with (run / "starts").open("a") as f:
        f.write(f"{recipe.stages['dpo'].data[0].labels}\n")
    if recipe.seed == 2 and not Path("mended").exists():
        sys.stdout.write("dpo: failed\n    12:00:00 dpo: no row is left of 12\n")
        sys.exit(1)
    if recipe.seed == 1:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
        (run / "waiting").touch()
        signal.pause()


if __name__ == "__main__":
    main()
