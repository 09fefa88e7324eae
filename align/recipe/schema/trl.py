"""Schema of the stage that runs a TRL trainer."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.recipe.schema.common import (
    BatchSize,
    Count,
    DataSpec,
    Fraction,
    OptimSpec,
    Ref,
    ZeroSpec,
    distinct_names,
    refuse_prefill,
)
from align.recipe.schema.dtype import Dtype
from align.recipe.schema.training import StageSpec
from align.recipe.schema.tuning import FullTuning, TuningSpec, refuse_beside, refuse_head
from reward_models.specs import RewardSpec

OWNED = (
    "output_dir",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "use_cpu",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "report_to",
    "logging_steps",
    "logging_strategy",
    "deepspeed",
    "gradient_checkpointing",
    "max_length",
    "eval_strategy",
    "eval_steps",
    "resume_from_checkpoint",
    "disable_tqdm",
    "save_only_model",
    "ignore_data_skip",
)
"""Trainer arguments that the stage sets from its own keys."""


class TrlStage(StageSpec):
    """Run any TRL trainer with this project's data, artifacts, metrics and resumption."""

    produces: ClassVar[str] = "policy"
    module: ClassVar[str] = "align.stages.trl.stage"
    kind: Literal["trl"]
    trainer: str = Field(pattern=r"^[A-Z][A-Za-z0-9]+$")
    """Class name without ``Trainer``: KTO, ORPO, CPO, RLOO, OnlineDPO, GKD ..."""
    init: Annotated[str, Ref("policy")]
    """Stage whose model is trained, or the folder of one."""
    reference: bool = False
    """Pass a frozen copy of ``init`` to the trainer as ``ref_model``."""
    teacher: Annotated[str | None, Ref("policy")] = None
    """Teacher policy of a distillation trainer (GKD, Distillation, GOLD, IWOPD)."""
    data: list[DataSpec] = Field(min_length=1)
    """Training rows."""
    heldout: list[DataSpec] = []
    """Rows that are evaluated during training and never trained on."""
    rows: Literal["sft", "preference", "unpaired", "prompts"]
    """Kind of rows that the trainer reads."""
    columns: list[str] = []
    """Additional columns that the trainer reads (TPO: reference); with prompts it gets all."""
    rewards: list[RewardSpec] = []
    """Reward functions of online trainers, passed as ``reward_funcs``."""
    args: dict[str, Any] = {}
    """Additional arguments of the trainer's configuration class."""
    tuning: TuningSpec = FullTuning(method="full")
    """Trained weights; with an adapter, the reference is the model with its adapter disabled."""
    optim: OptimSpec = OptimSpec()
    """Optimizer and learning rate."""
    zero: ZeroSpec = ZeroSpec()
    """What DeepSpeed shards over the ranks."""
    dtype: Dtype = "float32"
    """Data type of the weights; the recipe's ``dtype`` unless set."""
    max_length: Count | None = None
    """Maximum tokens of a row; longer rows are dropped. None for the trainer's own limit."""
    max_lost_frac: Fraction = 0.01
    """Maximum fraction of rows that may be dropped because of ``max_length``; more is an error."""
    max_contaminated_frac: Fraction = 0.05
    """Maximum fraction of held-out prompts that may appear in the training texts; more is an
    error."""
    batch_size: BatchSize = 8
    """Rows per optimizer step over all ranks."""
    micro_batch_size: Count = 8
    """Rows per forward-backward pass on one rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    steps: Count
    """Optimizer steps."""
    eval_every: int = Field(default=0, ge=0)
    """Optimizer steps between evaluations of ``heldout``; 0 for none."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Optimizer steps between checkpoints; 0 for no checkpoints."""
    keep_checkpoints: Count = 2
    """Number of most recent checkpoints to keep."""

    @model_validator(mode="after")
    def _legal(self) -> "TrlStage":
        owned = {"optim", "steps", *OWNED} & set(self.args)
        if owned:
            raise ValueError(
                f"args: {', '.join(sorted(owned))} are set by the stage's own keys (optim, steps, "
                "batch_size, micro_batch_size, dtype, checkpoint_every, eval_every, max_length)"
            )
        if self.batch_size % (self.micro_batch_size * self.ranks):
            raise ValueError("batch_size must be a multiple of micro_batch_size x ranks")
        distinct_names(self.rewards)
        refuse_prefill(self.rewards, "trl")
        refuse_head(self.tuning, "trl")
        refuse_beside(self.tuning)
        return self
