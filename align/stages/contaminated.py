"""The preflight's lines on held-out prompts that stand in the texts a stage trains on."""

from collections.abc import Sequence
from typing import Any

from align.core.errors import AlignError
from align.core.types import Example
from align.data.load import load_examples
from align.data.text.contamination import MIN_WORDS, Contamination, find_contamination
from align.preflight.checks import Check, Finding
from align.recipe.schema import EvaluateStage
from align.stages.base import StageContext

NUM_SHOWN = 5
EVALUATION = "evaluation"


def contamination_checks(
    context: StageContext,
    train: Sequence[Example],
    heldout: Sequence[Example],
    *,
    max_frac: float,
) -> tuple[list[Check], dict[str, Any]]:
    """Compare what a stage trains on with held-out prompts; return the card's lines and the notes.

    The stage's own held-out rows stop it where more than ``max_frac`` of them are contaminated;
    those of the recipe's evaluate stages, which may ask on purpose what was taught, only warn.
    """
    checks: list[Check] = []
    notes: dict[str, Any] = {}
    try:
        sides = {"": heldout, EVALUATION: _evaluated(context)}
    except AlignError as error:
        sides = {"": heldout}
        unread = Finding("not compared", "", "warn", f"its prompts cannot be read: {error}")
        checks.append((f"contamination: {EVALUATION}", lambda: unread))
    sides = {name: rows for name, rows in sides.items() if rows}
    for side, found in find_contamination(train, sides).items():
        name = f"contamination: {side}" if side else "contamination"
        finding = describe(found, max_frac=None if side else max_frac)
        checks.append((name, lambda finding=finding: finding))
        notes.setdefault("contamination", {})[side or "heldout"] = found.note()
    return checks, notes


def describe(found: Contamination, *, max_frac: float | None) -> Finding:
    """Put a result in words, held to ``max_frac``; None only warns."""
    value = f"{len(found.places)} of {found.checked} held-out prompts stand in the training texts"
    if found.skipped:
        value += f"; {found.skipped} of under {MIN_WORDS} words are too short to tell"
    bound = "none" if max_frac is None else f"at most {max_frac:.0%}"
    if not found.places:
        return Finding(value, bound)
    shown = [f"{held} stands in {trained}" for held, trained in found.places[:NUM_SHOWN]]
    more = len(found.places) - len(shown)
    remedy = "; ".join(shown) + (f"; and {more} more" if more else "")
    remedy += ". Remove these rows from one side"
    if max_frac is not None:
        remedy += ", or allow more with max_contaminated_frac"
    fails = max_frac is not None and found.frac > max_frac
    return Finding(value, bound, "fail" if fails else "warn", remedy)


def _evaluated(context: StageContext) -> list[Example]:
    """Load what the recipe's evaluate stages will ask, but for what stages of the run make."""
    examples: list[Example] = []
    for name, spec in context.recipe.stages.items():
        if isinstance(spec, EvaluateStage):
            prompts = [p for task in spec.all_tasks for p in task.prompts if p.stage is None]
            seed = context.recipe.seed_of(name)
            examples += load_examples(prompts, kind="prompts", seed=seed)
    return examples
