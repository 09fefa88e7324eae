"""Schema of every stage's keys and of the blocks that all training stages share."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.schema.common import (
    Count,
    DataSpec,
    OptimSpec,
    Positive,
    Ref,
    Spec,
    ZeroSpec,
    refuse_answers,
)
from align.recipe.schema.dtype import Dtype
from align.recipe.schema.formats import Kind
from align.recipe.schema.tuning import (
    FullTuning,
    Rate,
    TuningSpec,
    refuse_checkpointing,
    refuse_head,
    refuse_last,
)
from reward_models.identity import Aside
from reward_models.specs import Variants


class UnfreezeSpec(Spec):
    """Gradual unfreezing: start with the top layer, then unfreeze the next one below it."""

    every_steps: Count
    """Optimizer steps between two layers."""


class LayersSpec(Spec):
    """Frozen layers, gradual unfreezing and layer-wise learning rates (arXiv:1801.06146).

    Layers are the decoder's blocks, counted from 0 at the bottom. Everything above them (final
    norm, head, an adapter outside of the blocks) belongs to the top layer. The embeddings, and a
    head tied to them, are below layer 0.
    """

    freeze_first: Annotated[int, Field(ge=0)] = 0
    """Number of lowest layers that are never trained."""
    freeze_embeddings: bool = False
    """Do not train the embeddings, nor a head tied to them."""
    unfreeze: UnfreezeSpec | None = None
    """Unfreeze one layer after the other, from the top."""
    rate_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Ratio of a layer's learning rate to that of the layer above it."""

    @model_validator(mode="after")
    def _has_effect(self) -> "LayersSpec":
        if self == LayersSpec.model_construct():
            raise ValueError("the block changes nothing; give one of its keys, or remove it")
        return self


class EarlyStoppingSpec(Spec):
    """Early stopping on a held-out metric; the best weights are kept."""

    metric: str = "eval/loss"
    """Held-out metric that decides. Lower is better for a loss, a KL, a calibration error and the
    reward of bad responses; higher is better for everything else."""
    patience: Count = 3
    """Number of consecutive evaluations without improvement before the stage ends."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """Smallest improvement that counts, in the metric's unit."""


class EwcSpec(Spec):
    """Elastic weight consolidation: a penalty on changing weights that an old task needs.

    Reference: arXiv:1612.00796 eq. 3.
    """

    rows: ClassVar[Kind] = "sft"
    """Kind of the rows of ``data``."""
    coef: Positive
    """Lambda. The Fisher information is scaled to mean 1, so 1 is like an L2 penalty of 1/2."""
    data: list[DataSpec] = Field(min_length=1)
    """Supervised rows of the old task; each costs one backward pass before the first step."""
    cap: Annotated[float, Field(gt=1.0)] = 10.0
    """Largest Fisher information of a weight, in units of the mean."""


class AugmentSpec(Spec):
    """Augmentation of user turns, different in each epoch; responses are never changed."""

    word_dropout: Rate = 0.0
    """Probability of dropping each word of a user turn; at least one word remains."""
    templates: list[str] = []
    """Templates around a user turn, each with ``{text}`` once; one is drawn for each row."""


class KeepSpec(Spec):
    """Regularization against forgetting and over-fitting; all off by default."""

    dropout: Rate = 0.0
    """Rate of attention dropout and of the model's dropout layers while training."""
    early_stopping: EarlyStoppingSpec | None = None
    """Stop when a held-out metric no longer improves."""
    ewc: EwcSpec | None = None
    """Penalty on changing weights that an old task needs."""
    augment: AugmentSpec | None = None
    """Augmentation of user turns."""


class StageSpec(Variants):
    """Base of every stage: what it produces, and how its processes are started."""

    tag: ClassVar[str] = "kind"
    variants: ClassVar[dict[str, type["StageSpec"]]] = {}
    produces: ClassVar[str]
    """Kind of the artifact that it writes."""
    module: ClassVar[str]
    """Module whose ``prepare(spec, context)`` prepares the stage."""
    imports_model: ClassVar[bool] = False
    """Whether it loads a model from outside the run, whose files it reads while it runs."""
    if TYPE_CHECKING:  # Each class has its own literal.
        kind: str
    ranks: Count = 1
    """Number of processes: one per GPU, or any number on a CPU."""
    threads: Count | None = None
    """CPU threads per rank; None divides the cores among the ranks of this node."""
    seed: int | None = None
    """Random seed of this stage; None uses the recipe's."""


class TrainingStage(StageSpec):
    """Base of every training stage."""

    produces: ClassVar[str] = "policy"
    family: ClassVar[Literal["supervised", "policy"]]
    """Supervised learning, or optimization of a policy relative to its reference. The learning
    rates that are known to work depend on the family."""
    heldout_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics that it measures on held-out rows during training."""
    new_head: ClassVar[str | None] = None
    """The stage's kind if a new head replaces the model's language head."""
    init: Annotated[str, Ref("policy")]
    """Stage whose model is trained, or the folder of one."""
    dtype: Dtype = "float32"
    """Data type of the weights; the recipe's ``dtype`` unless set."""
    zero: ZeroSpec = ZeroSpec()
    """What DeepSpeed shards over the ranks."""
    optim: OptimSpec = OptimSpec()
    """Optimizer and learning rate."""
    tuning: TuningSpec = FullTuning()
    """Which weights are trained, and by which method."""
    layers: LayersSpec | None = None
    """Frozen layers and layer-wise learning rates."""
    keep: KeepSpec = KeepSpec()
    """Regularization against forgetting and over-fitting."""
    max_length: Count = 1024
    """Maximum tokens of prompt and response; longer rows are dropped and counted."""
    micro_tokens: Count = 8192
    """Maximum tokens of one forward-backward pass on one rank. Lower it if memory runs out; the
    batch size stays the same."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    expect: dict[str, tuple[float | None, float | None]] = {}
    """Expected range of this stage's final metrics, such as ``kl/reference: [0, 5]``. The report
    shows it beside the curve; a value outside its range makes the run exit with code 1."""
    not_learning: Literal["warn", "stop", "ignore"] = "warn"
    """What to do if the run does not learn: ``warn`` reports the cause, ``stop`` also ends the
    stage with exit code 1, and ``ignore`` does not check. With ``warn``, a stage that has learned
    nothing still fails at its end."""
    checkpoint_every: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], Aside()] = "auto"
    """Optimizer steps between checkpoints; 0 writes none, ``auto`` one about every 10 minutes."""
    keep_checkpoints: Annotated[Count, Aside()] = 2
    """Number of most recent checkpoints to keep."""
    reshard: Annotated[bool, Aside()] = False
    """Resume from checkpoints that were written with a different number of ranks or different
    ``zero`` settings. The training is then the same up to rounding, not bit-identical."""

    @property
    def sequence_ranks(self) -> int:
        """Return the number of ranks that share the tokens of a row."""
        return 1

    @model_validator(mode="after")
    def _tuning_fits(self) -> "TrainingStage":
        if self.new_head:
            refuse_last(self.tuning, self.new_head)
        else:
            refuse_head(self.tuning, "policy")
        if self.gradient_checkpointing:
            refuse_checkpointing(self.tuning)
        if self.reshard and self.layers is not None:
            raise ValueError(
                "reshard: the layers of 'layers' count their steps on their own, which another "
                "number of ranks cannot continue. Remove reshard and start as many ranks as before"
            )
        return self


def refuse_unfit(stage: TrainingStage, *, watched: bool) -> None:
    """Raise ValueError for a setting of ``keep`` that is invalid or has no effect in a stage.

    Args:
        stage: the stage.
        watched: True if the stage evaluates held-out rows during training.
    """
    keep = stage.keep
    if stage.family == "policy" and keep.dropout > 0.0:
        raise ValueError("keep.dropout would make the policy differ from its reference by chance")
    if keep.early_stopping is not None:
        _refuse_stopping(keep.early_stopping, stage, watched=watched)
    if keep.ewc is not None:
        _refuse_ewc(keep.ewc, stage)
    if keep.augment is not None:
        _refuse_augment(keep.augment, stage.kind)


def _refuse_stopping(stopping: EarlyStoppingSpec, stage: TrainingStage, *, watched: bool) -> None:
    if not stage.heldout_metrics:
        raise ValueError(
            "keep.early_stopping needs held-out rows; to stop an online stage early, use 'watch' "
            "with 'guard'"
        )
    if stopping.metric not in stage.heldout_metrics:
        raise ValueError(
            f"keep.early_stopping.metric: found '{stopping.metric}'; a {stage.kind} stage measures "
            + ", ".join(stage.heldout_metrics)
        )
    if not watched:
        raise ValueError("keep.early_stopping needs 'heldout' rows and 'eval_every' of 1 or more")


def _refuse_ewc(ewc: EwcSpec, stage: TrainingStage) -> None:
    if stage.new_head:
        raise ValueError(
            "keep.ewc protects the language head; "
            f"a {stage.kind} stage replaces it by another head; remove it"
        )
    if stage.tuning.method != "full":
        raise ValueError(
            f"keep.ewc regularizes the weights of the model, which {stage.tuning.method} tuning "
            "does not change; use full tuning, or remove it"
        )
    refuse_answers(ewc.data, "ewc")


def _refuse_augment(augment: AugmentSpec, kind: str) -> None:
    if kind != "sft":
        raise ValueError(
            f"keep.augment is for sft stages; a {kind} stage uses its rows unchanged; remove it"
        )
    if augment == AugmentSpec():
        raise ValueError("keep.augment changes nothing; give word_dropout or templates")
    for template in augment.templates:
        if template.count("{text}") != 1:
            raise ValueError(f"keep.augment.templates: {template!r} must contain {{text}} once")
