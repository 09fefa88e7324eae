"""The recipe schema: every key a recipe may hold, its default, its range. No torch here."""

from typing import Annotated, Any

from pydantic import Field

from align.recipe.schema.common import (
    BuildSpec,
    DataSpec,
    OptimSpec,
    SamplingSpec,
    Spec,
    TokenizerSpec,
    ZeroSpec,
)
from align.recipe.schema.data_stages import (
    CurateStage,
    DataStage,
    SelfInstructStage,
    WeakLabelStage,
)
from align.recipe.schema.evaluate import (
    EvaluateStage,
    HarnessSpec,
    MergeMethod,
    MergeStage,
    PairwiseSpec,
    TaskSpec,
)
from align.recipe.schema.offline import (
    AugmentSpec,
    BaseStage,
    ClassifyStage,
    DpoStage,
    EarlyStoppingSpec,
    EncoderStage,
    EwcSpec,
    KtoStage,
    LayersSpec,
    OfflineStage,
    RewardStage,
    SftStage,
    TrainingStage,
)
from align.recipe.schema.online import GrpoStage, GuardSpec, OnlineStage, PpoStage, WatchSpec
from align.recipe.schema.trl import TrlStage
from align.recipe.schema.tuning import TuningSpec
from reward_models.specs import EndpointSpec, EnsembleSpec, ProcessSpec, RewardSpec, ScalarSpec

__all__ = [
    "PRODUCES",
    "AnyStage",
    "AugmentSpec",
    "BaseStage",
    "BuildSpec",
    "ClassifyStage",
    "CurateStage",
    "DataSpec",
    "DataStage",
    "DpoStage",
    "EarlyStoppingSpec",
    "EncoderStage",
    "EndpointSpec",
    "EnsembleSpec",
    "EvaluateStage",
    "EwcSpec",
    "GrpoStage",
    "GuardSpec",
    "HarnessSpec",
    "KtoStage",
    "LayersSpec",
    "MergeMethod",
    "MergeStage",
    "OfflineStage",
    "OnlineStage",
    "OptimSpec",
    "PairwiseSpec",
    "PpoStage",
    "Recipe",
    "RewardSpec",
    "RewardStage",
    "SamplingSpec",
    "ScalarSpec",
    "SelfInstructStage",
    "SftStage",
    "SinkSpec",
    "Spec",
    "TaskSpec",
    "TokenizerSpec",
    "TrainingStage",
    "TrlStage",
    "TuningSpec",
    "WatchSpec",
    "WeakLabelStage",
    "ZeroSpec",
    "references",
]

AnyStage = Annotated[
    BaseStage
    | EncoderStage
    | SftStage
    | ClassifyStage
    | RewardStage
    | DpoStage
    | KtoStage
    | PpoStage
    | GrpoStage
    | TrlStage
    | SelfInstructStage
    | CurateStage
    | WeakLabelStage
    | EvaluateStage
    | MergeStage,
    Field(discriminator="kind"),
]

PRODUCES = {
    "base": "policy",
    "sft": "policy",
    "dpo": "policy",
    "kto": "policy",
    "ppo": "policy",
    "grpo": "policy",
    "merge": "policy",
    "trl": "policy",
    "reward": "reward_model",
    "encoder": "encoder",
    "classify": "classifier",
    "self_instruct": "data",
    "curate": "data",
    "weak_label": "data",
    "evaluate": "evaluation",
}
"""Artefact kind that each stage kind writes."""


class SinkSpec(Spec):
    """Choose where metrics.jsonl is mirrored to."""

    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False


class Recipe(Spec):
    """Hold one recipe: its stages run in the order they are written."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str = ""
    seed: int = 0
    sinks: SinkSpec = SinkSpec()
    stages: dict[str, AnyStage] = Field(min_length=1)

    def inputs(self, stage: str) -> dict[str, str]:
        """Give the references of a stage to others: dotted key -> stage name, path or hub id."""
        return references(self.stages[stage])


def references(spec: Any) -> dict[str, str]:
    """Find every reference to another stage or a model in a stage spec.

    Returns:
        Dotted key (``init``, ``data.0.stage``, ``rewards.0.model``, ``models.1`` ...) to the name.
    """
    found: dict[str, str] = {}

    def add(key: str, value: str | None) -> None:
        if value is not None:
            found[key] = value

    def walk(part: Any, key: str) -> None:
        if isinstance(part, DataSpec):
            add(f"{key}.stage", part.stage)
        elif isinstance(part, ScalarSpec | ProcessSpec):
            add(f"{key}.model", part.model)
        elif isinstance(part, list):
            for i, item in enumerate(part):
                walk(item, f"{key}.{i}")
        elif isinstance(part, Spec):
            for name in type(part).model_fields:
                walk(getattr(part, name), f"{key}.{name}" if key else name)

    if isinstance(spec, TrainingStage | TrlStage | SelfInstructStage):
        add("init", spec.init)
    if isinstance(spec, TrlStage):
        add("teacher", spec.teacher)
    if isinstance(spec, PpoStage):
        add("critic.init", spec.critic.init)
    if isinstance(spec, MergeStage):
        add("base", spec.base)
        add("tuned", spec.tuned)
        for i, name in enumerate(spec.others):
            add(f"others.{i}", name)
    if isinstance(spec, EvaluateStage):
        for key, names in (("models", spec.models), ("reward_models", spec.reward_models)):
            for i, name in enumerate(names):
                add(f"{key}.{i}", name)
        add("reference", spec.reference)
    walk(spec, "")
    return found
