"""The deep check of a recipe: the preflight of every stage whose inputs exist, without training.

Stages run up to their preflight in a temporary folder. It contains links to the run's finished
stages and the models that base and encoder stages import by path. The run folder is only read.
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from align.core import distributed
from align.core.artifacts import write_manifest
from align.core.card import Card, Line
from align.core.errors import EXIT_FAILED, EXIT_OK, EXIT_USER, AlignError
from align.core.failure import last_words
from align.core.log import log, setup_logging
from align.preflight.checks import run_checks
from align.recipe.load import read_resolved
from align.recipe.schema import BaseStage, Recipe
from align.stages.base import StageContext, prepare_stage


def main() -> NoReturn:
    """Check a recipe and write the cards to a file, one JSON object per line."""
    parser = argparse.ArgumentParser(description="Run the preflight of a recipe's stages.")
    parser.add_argument("--resolved", required=True, help="resolved recipe")
    parser.add_argument("--run-dir", required=True, help="folder with finished stages")
    parser.add_argument("--done", action="append", default=[], help="a finished stage")
    parser.add_argument("--only", help="the one stage to check")
    parser.add_argument("--cards", required=True, type=Path, help="where the cards are written")
    args = parser.parse_args()
    code = EXIT_OK
    try:
        distributed.init_process_group()
        setup_logging(0)
        recipe = read_resolved(args.resolved)
        done = {name: Path(args.run_dir).resolve() / name for name in args.done}
        with args.cards.open("a", encoding="utf-8") as out:
            for card in check_recipe(recipe, done, only=args.only):
                out.write(json.dumps(card.plain()) + "\n")
                out.flush()
                code = EXIT_USER if card.failed else code
    except AlignError as error:
        log.error("%s", error)
        code = error.exit_code
    except Exception as error:
        log.error("%s", last_words(error))
        code = EXIT_FAILED
    distributed.end_process(code)


def check_recipe(
    recipe: Recipe, done: dict[str, Path], *, only: str | None = None
) -> Iterator[Card]:
    """Yield the preflight card of each stage of a recipe, in order.

    Args:
        recipe: a valid recipe. done: finished stages and their folders.
        only: check this stage alone; its inputs are still imported.

    Yields:
        One card per stage. If the inputs do not exist yet, the card has one line saying so.
    """
    with tempfile.TemporaryDirectory(prefix="align-check-") as name:
        inputs, work = Path(name) / "inputs", Path(name) / "work"
        inputs.mkdir()
        for stage, path in done.items():
            # Links, so that a check cannot write into the run's folder.
            os.symlink(path, inputs / stage)
        for stage, spec in recipe.stages.items():
            wanted = only is None or stage == only
            if wanted or (spec.imports_model and stage not in done):
                scratch = work / stage
                scratch.mkdir(parents=True)
                card = check_stage(recipe, stage, inputs=inputs, scratch=scratch)
                # Models refer to themselves in cycles; without this, two would be in memory at
                # once.
                gc.collect()
                if wanted:
                    yield card


def check_stage(recipe: Recipe, name: str, *, inputs: Path, scratch: Path) -> Card:
    """Run one stage up to its preflight and return the card.

    Args:
        inputs: folder with the existing artifacts by stage; a model that a base stage imports by
            path is added to it.
        scratch: empty folder that the stage may write to.
    """
    spec = recipe.stages[name]
    missing = [
        reference
        for reference in dict.fromkeys(recipe.inputs(name).values())
        if reference in recipe.stages and not (inputs / reference).exists()
    ]
    if missing:
        what = f"needs {', '.join(missing)}, which does not exist yet"
        remedy = (
            "run the recipe up to there and check again; every stage also runs its own preflight"
        )
        return Card(name, spec.kind, [Line("inputs", what, "", "not yet", remedy)])
    context = StageContext(recipe, name, inputs, recipe.seed_of(name), scratch=scratch)
    try:
        if isinstance(spec, BaseStage) and (inputs / name).exists():
            from align.stages.preflight import base_checks

            return run_checks(name, spec.kind, base_checks(inputs / name / "model"))
        with context.resources:
            card = run_checks(name, spec.kind, prepare_stage(spec, context).checks)
    except AlignError as error:
        return Card(name, spec.kind, [Line("preparation", "stopped", "", "fail", str(error))])
    # A model imported by this stage is the input of later ones: finish it as an artifact.
    if (scratch / "model").is_dir() and not (inputs / name).exists():
        write_manifest(scratch, {"kind": spec.produces, "spec_hash": ""})
        os.symlink(scratch, inputs / name)
    return card


if __name__ == "__main__":
    main()
