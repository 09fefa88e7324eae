"""Which stage may start from an adapter that cannot be merged into the weights it belongs to."""

from collections.abc import Mapping
from typing import Any

from align.recipe.schema import EvaluateStage, PpoStage, TrainingStage, references
from align.recipe.tuning_schema import UNMERGED

CONTINUED = ("bottleneck", "loreft")
"""Unmerged adapters whose files hold all that was trained, so that training can go on."""
WHOLE = ("init", "base", "tuned", "others", "critic")
"""Keys that name a model of which only the weights are read, but for ``init`` where it trains."""


def start_problem(method: str) -> str:
    """Say why training cannot start on top of an adapter, and what can be done."""
    if method in CONTINUED:
        way = (
            f"repeat the same 'tuning' block, which goes on training this {method} adapter (not "
            "in a reward or classify stage, whose model is another one)"
        )
    else:
        way = "only its virtual tokens are saved, not what made them, so it cannot be trained on"
    return f"{_unmerged(method)}; {way}; or tune the earlier stage with a method that merges (lora)"


def adapter_problems(stages: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Find stages that would leave out, or cannot hold, an earlier stage's unmerged adapter.

    Args:
        stages: stage name to spec, None for one that is not valid by itself.

    Returns:
        (stage, dotted key) to what is wrong.
    """
    found = {}
    for name, spec in stages.items():
        for key, reference in references(spec).items() if spec is not None else ():
            made_by = getattr(stages.get(reference), "tuning", None)
            if made_by is not None and made_by.method in UNMERGED:
                problem = _problem(spec, key, made_by)
                if problem is not None:
                    found[name, key] = problem
    return found


def _problem(spec: Any, key: str, made_by: Any) -> str | None:
    """Say what is wrong where ``key`` names a model whose adapter is not merged."""
    part = key.partition(".")[0]
    if part == "init" and isinstance(spec, TrainingStage):
        if spec.new_head is not None or spec.tuning != made_by or made_by.method not in CONTINUED:
            return start_problem(made_by.method)
        if isinstance(spec, PpoStage) and spec.critic.init is None:
            return (
                f"{_unmerged(made_by.method)}, and the critic, which would start from it, takes "
                "weights alone; name a merged policy or a reward model in 'critic.init'"
            )
    elif part in WHOLE:
        return (
            f"{_unmerged(made_by.method)}, and a {spec.kind} stage takes weights alone here; tune "
            "that stage with a method that merges (lora)"
        )
    elif part == "models" and isinstance(spec, EvaluateStage) and spec.sampling.engine == "vllm":
        return f"{_unmerged(made_by.method)}; write sampling.engine: hf (or auto, which takes it)"
    return None


def _unmerged(method: str) -> str:
    return f"the model was tuned with {method}, whose adapter cannot be merged into its weights"
