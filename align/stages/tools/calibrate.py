"""Calibrate a judge (an endpoint, a reward model or a function) on human preference pairs."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NoReturn

from align.core.artifacts import find_model, write_json_atomic
from align.core.errors import EXIT_OK, AlignError
from align.recipe.schema import DataSpec, EndpointSpec, PairwiseSpec
from align.recipe.schema.evaluate import LONGER
from align.stages.evaluate.judge import calibrate
from reward_models.specs import FUNCTION


def main() -> NoReturn:
    """Calibrate the judge named on the command line and exit."""
    parser = argparse.ArgumentParser(description="Calibrate a judge on human preference pairs.")
    parser.add_argument("judge", help="URL, RUN/STAGE of a reward model, FILE.py:NAME, or 'longer'")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--model", help="name of the model at the endpoint")
    parser.add_argument("--pairs", required=True, help="file of preference pairs")
    parser.add_argument("--rows", type=int, help="pairs to judge; all by default")
    parser.add_argument(
        "--heldout-frac", type=float, help="use only the held-out pairs of this fraction"
    )
    parser.add_argument("--criteria", default=PairwiseSpec.model_fields["criteria"].default)
    parser.add_argument("--cache", default=EndpointSpec.model_fields["cache"].default)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    data = DataSpec(path=args.pairs, rows=args.rows)
    if args.heldout_frac is not None:
        held_out = {"split": "heldout", "heldout_frac": args.heldout_frac}
        data = data.model_copy(update=held_out)
    try:
        is_function = re.fullmatch(FUNCTION, args.judge)
        is_model = args.model is None and args.judge != LONGER and not is_function
        judge = str(find_model(args.judge, args.runs)) if is_model else args.judge
        found = calibrate(
            judge, model=args.model, data=[data], criteria=args.criteria, cache=args.cache
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(args.out, found)
    except AlignError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(EXIT_OK)


if __name__ == "__main__":
    main()
