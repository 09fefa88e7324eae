"""The recipe schema: every key of a recipe with its default and range. Never imports torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from align.recipe.schema.common import (
    BuildSpec,
    DataSpec,
    OptimSpec,
    Ref,
    SamplingSpec,
    Spec,
    TokenizerSpec,
    ZeroSpec,
)
from align.recipe.schema.dtype import Dtype
from align.recipe.schema.training import (
    AugmentSpec,
    EarlyStoppingSpec,
    EwcSpec,
    LayersSpec,
    StageSpec,
    TrainingStage,
)
from align.recipe.schema.tuning import TuningSpec
from reward_models.identity import Added, Aside
from reward_models.specs import EndpointSpec, EnsembleSpec, RewardSpec, ScalarSpec

# Kinds of stages are listed in the order in which their modules are imported.
# isort: split
from align.recipe.schema.offline import (
    BaseStage,
    ClassifyStage,
    DpoStage,
    EncoderStage,
    KtoStage,
    OfflineStage,
    RewardStage,
    SftStage,
)
from align.recipe.schema.online import GrpoStage, GuardSpec, OnlineStage, PpoStage, WatchSpec
from align.recipe.schema.trl import TrlStage

# isort: split
from align.recipe.schema.data_stages import (
    CurateStage,
    DataStage,
    LabelFunction,
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

__all__ = [
    "STAGES",
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
    "LabelFunction",
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
    "StageSpec",
    "TaskSpec",
    "TokenizerSpec",
    "TrainingStage",
    "TrlStage",
    "TuningSpec",
    "WatchSpec",
    "WeakLabelStage",
    "ZeroSpec",
    "ref_of",
    "reference_kinds",
    "references",
]

STAGES = StageSpec.variants
"""Stage kind to its class, the only list of kinds; the class declares what the kind produces."""


class SinkSpec(Spec):
    """Experiment trackers to which metrics.jsonl is mirrored."""

    tensorboard: bool = False
    """Write TensorBoard's event files."""
    wandb: bool = False
    """Log to Weights & Biases."""
    trackio: bool = False
    """Log to Trackio."""
    mlflow: bool = False
    """Log to MLflow, at ``MLFLOW_TRACKING_URI``."""
    swanlab: bool = False
    """Log to SwanLab."""
    names: Literal["align", "trl"] = "align"
    """``trl`` logs to the trackers under TRL's metric names; files keep the suite's own."""
    project: str | None = None
    """Project in the trackers; default: name of the run's folder."""
    group: str | None = None
    """Group of runs in the trackers; default: name of the run's folder."""
    tags: list[str] = []
    """Tags of the run in the trackers."""

    @property
    def chosen(self) -> list[str]:
        """Return the names of the trackers that are on."""
        return [name for name, on in self if on is True]

    @model_validator(mode="after")
    def _settings_need_a_tracker(self) -> "SinkSpec":
        found = self.chosen
        runs = [name for name in found if name != "tensorboard"]
        if self.names == "trl" and not found:
            raise ValueError("names: trl has no effect without a tracker")
        for key in ("project", "group", "tags"):
            if getattr(self, key) and not runs:
                raise ValueError(f"{key} needs wandb, trackio, mlflow or swanlab")
        return self


class Recipe(Spec):
    """A recipe; its stages run in the order in which they are written."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)]
    """Name of the run, and of its folder under ``runs/``."""
    description: str = ""
    """One-line description, shown in the report."""
    seed: int = 0
    """Random seed of every stage that does not set its own."""
    deterministic: bool = False
    """Use deterministic GPU kernels, which are slower. CPU kernels are always deterministic."""
    dtype: Annotated[Dtype | None, Aside(), Added("0.2")] = None
    """Data type of every stage that does not set its own: ``float32``, ``bfloat16``, or ``auto``
    for what the hardware computes faster. None is bfloat16 on GPUs of compute capability 8.0 or
    more, otherwise float32. Stages of the kind ``base`` keep that of the imported model."""
    device: Annotated[Literal["auto", "gpu"], Aside(), Added("0.2")] = "auto"
    """``gpu`` refuses to run without a GPU; ``auto`` falls back to the CPU."""
    sinks: SinkSpec = SinkSpec()
    """Experiment trackers that receive the metrics."""
    stages: dict[str, StageSpec] = Field(min_length=1)
    """The stages by name, in the order in which they run."""

    def inputs(self, stage: str) -> dict[str, str]:
        """Return the references of a stage to others: dotted key -> stage name, path or hub id."""
        return references(self.stages[stage])

    def seed_of(self, stage: str) -> int:
        """Return the seed of a stage: its own, or the recipe's."""
        own = self.stages[stage].seed
        return self.seed if own is None else own

    def folder_of(self, reference: str, run_dir: Path) -> Path:
        """Return the folder that a reference names: a stage's in the run, or any other."""
        return run_dir / reference if reference in self.stages else Path(reference)


def references(spec: Spec) -> dict[str, str]:
    """Return every reference of a stage to another stage or a model.

    Returns:
        Dotted key (``init``, ``data.0.stage``, ``rewards.0.model``, ``models.1`` ...) to the name.
    """
    return {key: name for key, name, _ in _marked(spec, "")}


def reference_kinds(spec: Spec) -> dict[str, tuple[str, ...]]:
    """Return the kinds of artifact that each reference of a stage may name, by its dotted key."""
    return {key: mark.kinds for key, _, mark in _marked(spec, "")}


def _marked(part: object, key: str) -> Iterator[tuple[str, str, Ref]]:
    """Yield (dotted key, name, mark) of every reference in a spec, at any depth."""
    if isinstance(part, list):
        for i, item in enumerate(part):
            yield from _marked(item, f"{key}{i}.")
    if not isinstance(part, Spec):
        return
    for name, field in type(part).model_fields.items():
        value, here = getattr(part, name), f"{key}{name}"
        mark = ref_of(field)
        if mark is None:
            yield from _marked(value, f"{here}.")
        elif isinstance(value, list):
            yield from ((f"{here}.{i}", item, mark) for i, item in enumerate(value))
        elif value is not None:
            yield here, value, mark


def ref_of(field: FieldInfo) -> Ref | None:
    """Return the mark of a field that names an artifact, None for any other."""
    return next((mark for mark in field.metadata if isinstance(mark, Ref)), None)
