"""Which stage may start from an adapter that cannot be merged into the weights it belongs to."""

from collections.abc import Mapping
from typing import Any

from align.recipe.tuning_schema import UNMERGED

CONTINUED = ("bottleneck", "loreft")
"""Unmerged adapters whose files hold all that was trained, so that training can go on."""


def start_problem(method: str) -> str:
    """Say why training cannot start on top of an adapter, and what can be done."""
    if method in CONTINUED:
        way = (
            f"repeat the same 'tuning' block, which goes on training this {method} adapter (not "
            "in a reward or classify stage, whose model is another one)"
        )
    else:
        way = "only its virtual tokens are saved, not what made them, so it cannot be trained on"
    return (
        f"the model was tuned with {method}, whose adapter cannot be merged into its weights; {way}"
        "; or tune the earlier stage with a method that merges (lora)"
    )


def adapter_problems(stages: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Find stages that start from an earlier stage's adapter which cannot be merged.

    Args:
        stages: stage name to spec, None for one that is not valid by itself.

    Returns:
        (stage, key) to what is wrong.
    """
    found = {}
    for name, spec in stages.items():
        before = stages.get(getattr(spec, "init", None) or "")
        made_by = getattr(before, "tuning", None)
        if made_by is None or made_by.method not in UNMERGED:
            continue
        ours = getattr(spec, "tuning", None)
        same_model = getattr(spec, "new_head", None) is None
        if same_model and ours == made_by and made_by.method in CONTINUED:
            continue
        found[name, "init"] = start_problem(made_by.method)
    return found
