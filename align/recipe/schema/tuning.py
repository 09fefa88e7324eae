"""Schema of ``tuning:``, which weights of a training stage are trained; one class per family.

Each method has only the keys that change something for it.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from align.recipe.schema.common import Count, Positive, Spec

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


def _names_one(value: Any) -> Any:
    if not value:
        raise ValueError("an empty list names no layer: nothing would be trained")
    return value


Targets = Annotated[Literal["all-linear"] | list[str], AfterValidator(_names_one)]
"""``all-linear`` is every linear layer of the decoder, the output head left out."""


class FullTuning(Spec):
    """Train every weight."""

    method: Literal["full"] = "full"


class HeadTuning(Spec):
    """Freeze the backbone and train the new task head of a reward or classify stage."""

    method: Literal["head"]


class LoraTuning(Spec):
    """Add low-rank updates (arXiv:2106.09685; rslora 2312.03732; dora 2402.09353).

    ``rslora`` scales by alpha / sqrt(rank) instead of alpha / rank; ``dora`` trains the norm of
    each output's weights apart from their direction.
    """

    method: Literal["lora", "rslora", "dora"]
    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Rate = 0.0
    targets: Targets = "all-linear"


class PissaTuning(Spec):
    """Train the leading singular directions of each weight (arXiv:2404.02948), alpha = rank."""

    method: Literal["pissa"]
    rank: Count = 16
    targets: Targets = "all-linear"


class QloraTuning(Spec):
    """Add low-rank updates to weights held in 4 bits, doubly quantised NF4 (arXiv:2305.14314)."""

    method: Literal["qlora"]
    rank: Count = 16
    alpha: Positive = 32.0
    dropout: Rate = 0.0
    targets: Targets = "all-linear"


class Ia3Tuning(Spec):
    """Scale keys, values and the inner activations of the MLP by trained vectors (2205.05638)."""

    method: Literal["ia3"]


class OftTuning(Spec):
    """Rotate the inputs of each weight by trained orthogonal blocks (arXiv:2306.07280)."""

    method: Literal["oft"]
    block_size: Annotated[int, Field(ge=2)] = 32
    """Must divide the inputs of every target."""
    targets: Targets = "all-linear"


class VeraTuning(Spec):
    """Scale shared random low-rank matrices by trained vectors (arXiv:2310.11454)."""

    method: Literal["vera"]
    rank: Count = 256
    targets: Targets = "all-linear"


class BottleneckTuning(Spec):
    """Insert small two-layer networks after attention and after the MLP (arXiv:1902.00751)."""

    method: Literal["bottleneck"]
    size: Count = 64
    """Units of the inner layer."""


class PrefixTuning(Spec):
    """Train keys and values of virtual tokens in every layer, through a small MLP (2101.00190)."""

    method: Literal["prefix"]
    virtual_tokens: Count = 16
    hidden: Count | None = None
    """Units of that MLP; None is the model's hidden size."""


class PromptTuning(Spec):
    """Train the embeddings of virtual tokens (arXiv:2104.08691), begun from those of real ones."""

    method: Literal["prompt"]
    virtual_tokens: Count = 16


class PtuningTuning(Spec):
    """Train virtual tokens whose embeddings an MLP makes (arXiv:2103.10385)."""

    method: Literal["ptuning"]
    virtual_tokens: Count = 16
    hidden: Count = 128
    """Units of that MLP."""


class LoreftTuning(Spec):
    """Edit hidden states in a low-rank subspace (arXiv:2404.03592 eq. 2).

    By default every token is edited. ``first`` and ``last`` edit that many tokens at the start and
    the end of the prompt instead; the tokens of the answer then stay as they are.
    """

    method: Literal["loreft"]
    rank: Count = 4
    layers: Annotated[
        Literal["all"] | list[Annotated[int, Field(ge=0)]], AfterValidator(_names_one)
    ] = "all"
    """Layers after which hidden states are edited, counted from 0."""
    first: Annotated[int, Field(ge=0)] | None = None
    last: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _edits_something(self) -> "LoreftTuning":
        if (self.first is not None or self.last is not None) and not self.first and not self.last:
            raise ValueError("'first' and 'last' are 0: no token is edited; leave both out for all")
        return self


TuningSpec = Annotated[
    FullTuning
    | HeadTuning
    | LoraTuning
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

UNMERGED = ("bottleneck", "prefix", "prompt", "ptuning", "loreft")
"""Methods whose adapter cannot be added into the weights: it stays beside the model."""

VIRTUAL = ("prefix", "prompt", "ptuning")
"""Methods that put virtual tokens before the text."""


SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of a LoRA that vLLM can be built for."""


def refuse_dropout(tuning: TuningSpec) -> None:
    """Raise ValueError where dropout would blur the comparison with the reference."""
    if isinstance(tuning, LoraTuning | QloraTuning) and tuning.dropout > 0.0:
        raise ValueError("tuning.dropout would make the policy differ from its reference by chance")


def refuse_head(tuning: TuningSpec, kind: str) -> None:
    """Raise ValueError where there is no new head to train."""
    if tuning.method == "head":
        raise ValueError(
            f"tuning.method head trains a new task head, which a {kind} stage does not add; use it "
            "in reward or classify, or choose another method"
        )


def refuse_beside(tuning: TuningSpec) -> None:
    """Raise ValueError for what TRL's trainers cannot hold: they know peft's own layers only."""
    if tuning.method in (*UNMERGED, "pissa", "qlora"):
        raise ValueError(
            f"tuning.method {tuning.method} is not for trainers of TRL, which save and load "
            "adapters by themselves, and would not resume exactly; use lora, rslora, dora, ia3, "
            "oft or vera, or this suite's own stage (sft, dpo, kto, grpo)"
        )


def refuse_checkpointing(tuning: TuningSpec) -> None:
    """Raise ValueError for virtual tokens under gradient checkpointing."""
    if tuning.method in VIRTUAL:
        raise ValueError(
            "gradient_checkpointing drops the cache that carries the virtual tokens of "
            f"{tuning.method} tuning; set it to false, or choose a method such as lora"
        )


def refuse_served(tuning: TuningSpec, engine: str) -> None:
    """Raise ValueError where vLLM is asked for by name and cannot hold the adapter."""
    if tuning.method in UNMERGED and engine == "vllm":
        raise ValueError(
            f"sampling.engine vllm cannot sample from a {tuning.method} adapter, which cannot be "
            "merged; use engine: hf (or auto, which takes it and says so)"
        )


def refuse_pushed(tuning: TuningSpec, engine: str) -> None:
    """Raise ValueError where vLLM cannot be given the adapter alone."""
    if engine == "hf":
        raise ValueError("sampling.push: adapter has no effect with engine hf; remove it")
    if not isinstance(tuning, LoraTuning) or tuning.method == "dora":
        raise ValueError(
            f"sampling.push: adapter needs an adapter that vLLM serves (lora or rslora); with "
            f"{tuning.method} leave it out: whole weights are pushed"
        )
    if tuning.rank > SERVED_RANKS[-1]:
        raise ValueError(
            f"sampling.push: adapter: vLLM serves ranks up to {SERVED_RANKS[-1]}, found "
            f"{tuning.rank}"
        )


def refuse_last(tuning: TuningSpec, kind: str) -> None:
    """Raise ValueError where the end of the prompt is not known: a scorer sees one text."""
    if isinstance(tuning, LoreftTuning) and tuning.last:
        raise ValueError(
            f"tuning.last: a {kind} model does not know where a prompt ends; leave 'first' and "
            "'last' out (every token is edited), or give 'first' only"
        )
