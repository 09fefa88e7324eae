"""Run several stages of a recipe one after the other in this process, as one of any ranks."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from align.core import distributed
from align.recipe.load import load_recipe
from align.stages import base


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--stages", nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for stage in args.stages:
        given = argparse.Namespace(
            recipe=args.recipe,
            resolved=None,
            stage=stage,
            runs=Path("runs"),
            run_dir=args.run_dir,
            overrides=args.overrides,
            force=False,
        )
        kind = load_recipe(args.recipe, args.overrides).stages[stage].kind
        assert base.run_stage(kind, given) == 0, stage
    distributed.shutdown()
    distributed.end_process(0)


if __name__ == "__main__":
    main()
