"""Rules about what a stage starts from: adapters that cannot be merged, and encoders."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.recipe.schema import StageSpec, references
from align.recipe.schema.evaluate import EvaluateStage
from align.recipe.schema.offline import ClassifyStage, EncoderStage, RewardStage
from align.recipe.schema.online import PpoStage
from align.recipe.schema.training import TrainingStage
from align.recipe.schema.tuning import METHODS, TuningSpec

WHOLE = ("init", "base", "tuned", "others", "critic")
"""Keys of models whose weights alone are read; ``init`` of a training stage is an exception."""


def start_problem(method: str) -> str:
    """Return why training cannot start from an unmerged adapter, and what to do instead."""
    if METHODS[method].continues:
        way = (
            f"repeat the same 'tuning' block, which continues to train this {method} adapter (not "
            "in a reward or classify stage, whose model has another head)"
        )
    else:
        way = "only its virtual tokens are saved, so it cannot be trained further"
    return f"{_unmerged(method)}; {way}; or tune the earlier stage with a method that merges (lora)"


def adapter_problems(stages: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the stages that would ignore, or cannot load, an earlier stage's unmerged adapter.

    Args:
        stages: stage name to spec, None for an invalid stage.

    Returns:
        (stage, dotted key) to the problem.
    """
    found = {}
    for name, spec in stages.items():
        if spec is None:
            continue
        for key, reference in references(spec).items():
            made_by = getattr(stages.get(reference), "tuning", None)
            if made_by is not None and not made_by.merges:
                problem = _problem(spec, key, made_by)
                if problem is not None:
                    found[name, key] = problem
    return found


def _problem(spec: StageSpec, key: str, made_by: TuningSpec) -> str | None:
    """Return the problem if ``key`` names a model with an unmerged adapter, None if it works."""
    part = key.partition(".")[0]
    if part == "init" and isinstance(spec, TrainingStage):
        if spec.new_head is not None or spec.tuning != made_by or not made_by.continues:
            return start_problem(made_by.method)
        if isinstance(spec, PpoStage) and spec.critic.init is None:
            return (
                f"{_unmerged(made_by.method)}, but the critic would start from its weights alone; "
                "name a merged policy or a reward model in 'critic.init'"
            )
    elif part in WHOLE:
        return (
            f"{_unmerged(made_by.method)}, but a {spec.kind} stage reads only weights here; tune "
            "that stage with a method that merges (lora)"
        )
    elif part == "models" and isinstance(spec, EvaluateStage) and spec.sampling.engine == "vllm":
        return f"{_unmerged(made_by.method)}; write sampling.engine: hf (or auto, which uses hf)"
    return None


def _unmerged(method: str) -> str:
    return f"the model was tuned with {method}, whose adapter cannot be merged into its weights"


Problem = tuple[str, str]
"""A dotted key below a stage, and the problem with its value."""


def encoder_problems(stages: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return the settings that need a decoder although the recipe names an encoder.

    Args:
        stages: stage name to spec, None for an invalid stage.

    Returns:
        (stage, dotted key) to the problem.
    """
    found: dict[tuple[str, str], str] = {}
    for name, spec in stages.items():
        problems: list[Problem] = []
        if isinstance(spec, RewardStage | ClassifyStage) and is_encoder(spec.init, stages):
            problems = list(_head(spec))
        if isinstance(spec, PpoStage) and _scores_whole_texts(spec.critic.init, stages):
            problems = [
                (
                    "critic.init",
                    "it scores whole texts (its init is an encoder), but a critic scores every "
                    "token; remove it to start the critic from the policy, or name a reward model "
                    "whose init is a decoder",
                )
            ]
        found |= {(name, key): problem for key, problem in problems}
    return found


def is_encoder(reference: str, stages: Mapping[str, Any]) -> bool:
    """Return whether a stage name or an artifact's folder refers to an encoder."""
    if reference in stages:
        return isinstance(stages[reference], EncoderStage)
    return read_mapping(Path(reference) / "manifest.json").get("kind") == "encoder"


def _scores_whole_texts(reference: str | None, stages: Mapping[str, Any]) -> bool:
    if reference is None:
        return False
    if reference in stages:
        spec = stages[reference]
        return isinstance(spec, RewardStage) and is_encoder(spec.init, stages)
    return read_mapping(Path(reference) / "model" / "scorer.json").get("reads") == "first"


def read_mapping(path: Path) -> dict[str, Any]:
    """Return a file's JSON mapping, {} if it is invalid; what reads it later reports the error."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _head(spec: RewardStage | ClassifyStage) -> Iterator[Problem]:
    method = spec.tuning.method
    if spec.tuning.virtual:
        yield (
            "tuning.method",
            f"{method} puts virtual tokens before the text of a decoder, and init is an encoder; "
            "use lora or bottleneck",
        )
    if isinstance(spec, ClassifyStage):
        return
    if spec.supervision == "steps":
        yield (
            "supervision",
            "an encoder gives one score to a whole text and none to its steps; set init to a "
            "policy (kind: base), or use pairs or answers",
        )
    if spec.norm_sampling is not None:
        yield (
            "norm_sampling",
            "an encoder cannot generate responses; remove it to compute mean and std on the "
            "responses of 'data'",
        )
