"""Preflight checks for held-out prompts that appear in the training data."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.core.errors import AlignError
from align.core.types import Example
from align.data.load import load_examples
from align.data.store.columns import record
from align.data.store.folder import open_or_build
from align.data.store.rows import StoredExamples
from align.data.text.contamination import MIN_WORDS, Contamination, find_contamination
from align.preflight.checks import Check, Finding
from align.recipe.schema import EvaluateStage, Recipe

NUM_SHOWN = 5
EVALUATION = "evaluation"


def contamination_checks(
    recipe: Recipe,
    train: Sequence[Example],
    heldout: Sequence[Example],
    *,
    max_frac: float,
) -> tuple[list[Check], dict[str, Any]]:
    """Compare training data with held-out prompts and return the checks and the manifest's notes.

    The stage fails if more than ``max_frac`` of its own held-out rows are contaminated. Prompts of
    the recipe's evaluate stages, which may repeat training data on purpose, only warn.
    """
    checks: list[Check] = []
    notes: dict[str, Any] = {}
    try:
        # An unreadable evaluation file must not stop a training stage that does not need it.
        sides = {"": heldout, EVALUATION: _evaluated(recipe)}
    except AlignError as error:
        sides = {"": heldout}
        unread = Finding("not compared", "", "warn", f"its prompts cannot be read: {error}")
        checks.append((f"contamination: {EVALUATION}", lambda: unread))
    sides = {name: rows for name, rows in sides.items() if rows}
    for side, found in _compared(train, sides).items():
        name = f"contamination: {side}" if side else "contamination"
        finding = describe(found, max_frac=None if side else max_frac)
        # Bound as a default: a plain closure would see the last finding of the loop.
        checks.append((name, lambda finding=finding: finding))
        notes.setdefault("contamination", {})[side or "heldout"] = found.note()
    return checks, notes


def _compared(
    train: Sequence[Example], sides: Mapping[str, Sequence[Example]]
) -> dict[str, Contamination]:
    """Return the comparison; for rows of a store, that of the same rows is read from there."""
    if not isinstance(train, StoredExamples):
        return find_contamination(train, sides)
    # The key is a hash of all rows on both sides, so that a changed row is compared anew.
    held = hashlib.sha256(train.identity().encode())
    for name, rows in sides.items():
        held.update(name.encode())
        for example in rows:
            held.update(record(example))

    def compare(_folder: Path) -> dict[str, Any]:
        return {"found": {k: asdict(c) for k, c in find_contamination(train, sides).items()}}

    _, known = open_or_build(held.hexdigest()[:32], compare)
    return {
        name: Contamination(**{**found, "places": [tuple(both) for both in found["places"]]})
        for name, found in known["found"].items()
    }


def describe(found: Contamination, *, max_frac: float | None) -> Finding:
    """Return the finding of a comparison; with ``max_frac`` None it only warns."""
    value = f"{len(found.places)} of {found.checked} held-out prompts appear in the training data"
    if found.skipped:
        value += f" ({found.skipped} prompts shorter than {MIN_WORDS} words were not checked)"
    bound = "none" if max_frac is None else f"at most {max_frac:.0%}"
    if not found.places:
        return Finding(value, bound)
    shown = [f"{held} appears in {trained}" for held, trained in found.places[:NUM_SHOWN]]
    more = len(found.places) - len(shown)
    remedy = "; ".join(shown) + (f"; and {more} more" if more else "")
    remedy += ". Remove these rows from one side"
    if max_frac is not None:
        remedy += ", or allow more with max_contaminated_frac"
    fails = max_frac is not None and found.frac > max_frac
    return Finding(value, bound, "fail" if fails else "warn", remedy)


def _evaluated(recipe: Recipe) -> list[Example]:
    """Return the prompts of the evaluate stages, except those that other stages produce."""
    examples: list[Example] = []
    for name, spec in recipe.stages.items():
        if isinstance(spec, EvaluateStage):
            prompts = [p for task in spec.all_tasks for p in task.prompts if p.stage is None]
            seed = recipe.seed_of(name)
            examples += load_examples(prompts, kind="prompts", seed=seed)
    return examples
