"""Schema of ``tuning:``, the choice of trained weights; one class per family of methods.

Each method has only the keys that affect it.
"""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from align.recipe.schema.common import Count, Positive, Spec

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


def _names_one(value: Any) -> Any:
    if not value:
        raise ValueError("the list is empty: nothing would be trained; name at least one layer")
    return value


Targets = Annotated[Literal["all-linear"] | list[str], AfterValidator(_names_one)]
"""``all-linear`` means every linear layer of the decoder except the output head."""


class Tuning(Spec):
    """Base of the methods; the class variables declare the capabilities of a method."""

    merges: ClassVar[bool] = True
    """The adapter can be merged into the weights; otherwise it is saved separately."""
    virtual: ClassVar[bool] = False
    """The method prepends virtual tokens to the text."""
    inside_layers: ClassVar[bool] = True
    """The method trains weights inside the layers."""
    continues: ClassVar[bool] = False
    """The files of the unmerged adapter contain everything needed to continue training."""
    new_at_start: ClassVar[bool] = False
    """The policy (or the engine's copy of it) differs from ``init`` before the first step."""
    in_trl: ClassVar[bool] = True
    """TRL's trainers, which save and load adapters themselves, can train and resume it."""
    served_ranks: ClassVar[tuple[int, ...]] = ()
    """Maximum ranks that vLLM can be configured for when it serves the adapter alone."""
    peft_type: ClassVar[str | None] = None
    """peft's name of an adapter that is saved separately."""


class BesideTuning(Tuning):
    """Base of the methods whose adapter cannot be merged."""

    merges: ClassVar[bool] = False
    new_at_start: ClassVar[bool] = True
    in_trl: ClassVar[bool] = False


class VirtualTuning(BesideTuning):
    """Base of the methods that prepend virtual tokens to the text."""

    virtual: ClassVar[bool] = True
    inside_layers: ClassVar[bool] = False


class FullTuning(Tuning):
    """Train every weight."""

    method: Literal["full"] = "full"


class HeadTuning(Tuning):
    """Freeze the backbone and train the new task head of a reward or classify stage."""

    inside_layers: ClassVar[bool] = False
    method: Literal["head"]


class LoraTuning(Tuning):
    """Add low-rank updates (arXiv:2106.09685).

    ``rslora`` scales by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732).
    """

    served_ranks: ClassVar[tuple[int, ...]] = (8, 16, 32, 64, 128, 256, 320, 512)
    method: Literal["lora", "rslora"]
    rank: Count = 16
    """Rank of the updates."""
    alpha: Positive = 32.0
    """Scale of the updates, before the division by the rank."""
    dropout: Rate = 0.0
    """Probability of dropping an input of the adapter; not with a reference."""
    targets: Targets = "all-linear"
    """``all-linear``, or endings of module names such as ``q_proj``."""


class DoraTuning(LoraTuning):
    """Train the norm of each output's weights separately from the direction (arXiv:2402.09353)."""

    served_ranks: ClassVar[tuple[int, ...]] = ()
    method: Literal["dora"]


class PissaTuning(Tuning):
    """Train the leading singular directions of each weight (arXiv:2404.02948), alpha = rank."""

    in_trl: ClassVar[bool] = False
    method: Literal["pissa"]
    rank: Count = 16
    """Number of singular directions."""
    targets: Targets = "all-linear"
    """``all-linear``, or endings of module names such as ``q_proj``."""


class QloraTuning(Tuning):
    """Add low-rank updates to 4-bit weights, doubly quantized NF4 (arXiv:2305.14314)."""

    new_at_start: ClassVar[bool] = True
    in_trl: ClassVar[bool] = False
    method: Literal["qlora"]
    rank: Count = 16
    """Rank of the updates."""
    alpha: Positive = 32.0
    """Scale of the updates, before the division by the rank."""
    dropout: Rate = 0.0
    """Probability of dropping an input of the adapter; not with a reference."""
    targets: Targets = "all-linear"
    """``all-linear``, or endings of module names such as ``q_proj``."""


class Ia3Tuning(Tuning):
    """Scale keys, values and the inner activations of the MLP by trained vectors (2205.05638)."""

    method: Literal["ia3"]


class OftTuning(Tuning):
    """Rotate the inputs of each weight by trained orthogonal blocks (arXiv:2306.07280)."""

    method: Literal["oft"]
    block_size: Annotated[int, Field(ge=2)] = 32
    """Must divide the inputs of every target."""
    targets: Targets = "all-linear"
    """``all-linear``, or endings of module names such as ``q_proj``."""


class VeraTuning(Tuning):
    """Scale shared random low-rank matrices by trained vectors (arXiv:2310.11454)."""

    method: Literal["vera"]
    rank: Count = 256
    """Rank of the shared random matrices."""
    targets: Targets = "all-linear"
    """``all-linear``, or endings of module names such as ``q_proj``."""


class BottleneckTuning(BesideTuning):
    """Insert small two-layer networks after attention and after the MLP (arXiv:1902.00751)."""

    continues: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "BOTTLENECK"
    method: Literal["bottleneck"]
    size: Count = 64
    """Units of the inner layer."""


class PrefixTuning(VirtualTuning):
    """Train keys and values of virtual tokens in every layer by an MLP (arXiv:2101.00190)."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    method: Literal["prefix"]
    virtual_tokens: Count = 16
    """Number of virtual tokens."""
    hidden: Count | None = None
    """Units of the MLP; None for the model's hidden size."""


class PromptTuning(VirtualTuning):
    """Train the embeddings of virtual tokens, initialized from real ones (arXiv:2104.08691)."""

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    method: Literal["prompt"]
    virtual_tokens: Count = 16
    """Number of virtual tokens."""


class PtuningTuning(VirtualTuning):
    """Train virtual tokens whose embeddings are computed by an MLP (arXiv:2103.10385)."""

    peft_type: ClassVar[str | None] = "P_TUNING"
    method: Literal["ptuning"]
    virtual_tokens: Count = 16
    """Number of virtual tokens."""
    hidden: Count = 128
    """Units of the MLP."""


class LoreftTuning(BesideTuning):
    """Edit hidden states in a low-rank subspace (arXiv:2404.03592 eq. 2).

    By default every token is edited. ``first`` and ``last`` edit that many tokens at the start and
    the end of the prompt instead; the tokens of the response are then unchanged.
    """

    continues: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LOREFT"
    method: Literal["loreft"]
    rank: Count = 4
    """Dimension of the subspace."""
    layers: Annotated[
        Literal["all"] | list[Annotated[int, Field(ge=0)]], AfterValidator(_names_one)
    ] = "all"
    """Layers after which hidden states are edited, counted from 0."""
    first: Annotated[int, Field(ge=0)] | None = None
    """Number of edited tokens at the start of the prompt."""
    last: Annotated[int, Field(ge=0)] | None = None
    """Number of edited tokens at the end of the prompt."""

    @model_validator(mode="after")
    def _edits_something(self) -> "LoreftTuning":
        if (self.first is not None or self.last is not None) and not self.first and not self.last:
            raise ValueError("'first' and 'last' are 0: no token is edited; omit both to edit all")
        return self


TuningSpec = Annotated[
    FullTuning
    | HeadTuning
    | LoraTuning
    | DoraTuning
    | PissaTuning
    | QloraTuning
    | Ia3Tuning
    | OftTuning
    | VeraTuning
    | BottleneckTuning
    | PrefixTuning
    | PromptTuning
    | PtuningTuning
    | LoreftTuning,
    Field(discriminator="method"),
]

METHODS: dict[str, type[Tuning]] = {
    method: tuning
    for tuning in get_args(get_args(TuningSpec)[0])
    for method in get_args(tuning.model_fields["method"].annotation)
}
"""Class of each method."""


def refuse_dropout(tuning: TuningSpec) -> None:
    """Raise ValueError if dropout would randomize the comparison with the reference."""
    if isinstance(tuning, LoraTuning | QloraTuning) and tuning.dropout > 0.0:
        raise ValueError("tuning.dropout would make the policy differ from its reference by chance")


def refuse_head(tuning: TuningSpec, kind: str) -> None:
    """Raise ValueError if a stage without a new head is asked to train one."""
    if tuning.method == "head":
        raise ValueError(
            f"tuning.method head trains a new task head, which a {kind} stage does not add; use it "
            "in reward or classify, or choose another method"
        )


def refuse_beside(tuning: TuningSpec) -> None:
    """Raise ValueError for methods that TRL's trainers do not support: they know only peft's."""
    if not tuning.in_trl:
        raise ValueError(
            f"tuning.method {tuning.method} is not for trainers of TRL: they save and load "
            "adapters themselves and could not resume exactly; use lora, rslora, dora, ia3, "
            "oft or vera, or a stage of this project (sft, dpo, kto, grpo)"
        )


def refuse_checkpointing(tuning: TuningSpec) -> None:
    """Raise ValueError for virtual tokens under gradient checkpointing."""
    if tuning.virtual:
        raise ValueError(
            "gradient_checkpointing drops the cache that carries the virtual tokens of "
            f"{tuning.method} tuning; set it to false, or choose a method such as lora"
        )


def refuse_served(tuning: TuningSpec, engine: str) -> None:
    """Raise ValueError if vLLM is requested but cannot load the adapter."""
    if not tuning.merges and engine == "vllm":
        raise ValueError(
            f"sampling.engine vllm cannot sample from a {tuning.method} adapter, which cannot be "
            "merged; use engine: hf (or auto, which falls back to hf)"
        )


def refuse_pushed(tuning: TuningSpec, engine: str) -> None:
    """Raise ValueError if vLLM cannot serve the adapter alone."""
    if engine == "hf":
        raise ValueError("sampling.push: adapter has no effect with engine hf; remove it")
    if not isinstance(tuning, LoraTuning) or not tuning.served_ranks:
        raise ValueError(
            f"sampling.push: adapter needs an adapter that vLLM serves (lora or rslora); with "
            f"{tuning.method} omit it, and all weights are pushed"
        )
    if tuning.rank > tuning.served_ranks[-1]:
        raise ValueError(
            f"sampling.push: adapter: vLLM serves ranks up to {tuning.served_ranks[-1]}, "
            f"found {tuning.rank}"
        )


def refuse_last(tuning: TuningSpec, kind: str) -> None:
    """Raise ValueError for ``last`` in a scorer, which sees one text without a prompt's end."""
    if isinstance(tuning, LoreftTuning) and tuning.last:
        raise ValueError(
            f"tuning.last: a {kind} model does not know where a prompt ends; leave 'first' and "
            "'last' out (every token is edited), or give 'first' only"
        )
