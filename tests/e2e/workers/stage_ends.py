"""Start stages one after the other as a stage process does, and note how each ends.

One process, because the imports take longer than all the stages. Standard input: a JSON list of
[kind, recipe, run folder]; last line of standard output: a JSON list of [exit code, message].
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from align.core import distributed
from align.core.errors import AlignError
from align.stages import base


def end_of(kind: str, recipe: str, run_dir: str) -> tuple[int, str]:
    """Run the only stage of a recipe; give the exit code that its process would have."""
    given = argparse.Namespace(
        recipe=recipe,
        resolved=None,
        stage=None,
        runs=Path("runs"),
        run_dir=run_dir,
        overrides=[],
        force=False,
    )
    try:
        return base.run_stage(kind, given), ""
    except AlignError as error:
        return error.exit_code, str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ends = [end_of(*words) for words in json.load(sys.stdin)]
    sys.stdout.write("\n" + json.dumps(ends) + "\n")
    distributed.shutdown()
    distributed.end_process(0)
