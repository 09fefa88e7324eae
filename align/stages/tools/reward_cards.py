"""Measure reward models outside a recipe, for ``align eval`` on reward artifacts."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from align.core.artifacts import Artifact, find_model, read_artifact, write_json_atomic
from align.core.errors import EXIT_OK, AlignError, DataError
from align.core.log import setup_logging
from align.recipe.schema import DataSpec
from align.stages.evaluate.reward_cards import CardInput, build_cards

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Measure the reward models named on the command line, write their cards, and exit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="+", help="RUN/STAGE or folder of each reward stage")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument(
        "--pairs", help="data sources as JSON; default: the held-out data of the stage"
    )
    parser.add_argument("--sets", default="[]", help="data sources as JSON")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    setup_logging(0)
    code = EXIT_OK
    try:
        models = {
            name: read_artifact(find_model(name, args.runs), "reward_model")
            for name in args.artifacts
        }
        write_json_atomic(args.out, measure(models, args.pairs, args.sets))
    except AlignError as error:
        log.error("%s", error)
        code = error.exit_code
    sys.exit(code)


def measure(models: dict[str, Artifact], pairs: str | None, sets: str) -> dict[str, Any]:
    """Return the card of each model, all on the same data.

    Raises:
        DataError: no pairs are given, and the first model's stage held none out.
    """
    first = next(iter(models.values())).manifest
    spec = first["spec"]
    named = json.loads(pairs) if pairs else spec.get("heldout", [])
    if not named or (not pairs and spec.get("supervision", "pairs") != "pairs"):
        raise DataError(
            f"{next(iter(models))}: its stage held out no pairs. Pass some with --pairs FILE"
        )
    given = CardInput(
        pairs=sources(named),
        sets=sources(json.loads(sets)),
        max_length=spec["max_length"],
        # Rows that do not fit are only counted on the card; the training stage has bounded them.
        max_lost_frac=1.0,
        seed=first["seed"],
    )
    return build_cards(models, given)


def sources(plain: Sequence[dict[str, Any]]) -> list[DataSpec]:
    """Return data sources from their recipe form."""
    return [DataSpec.model_validate(source) for source in plain]


if __name__ == "__main__":
    main()
