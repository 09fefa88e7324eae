"""Schema of ``tuning:``, the choice of trained weights; one class per family of methods.

Each method has only the keys that affect it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from align.recipe.schema.common import Count, Positive
from reward_models.specs import Variants

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


def _names_one(value: object) -> Any:
    if not value:
        raise ValueError("the list is empty: nothing would be trained; name at least one layer")
    return value


Targets = Annotated[Literal["all-linear"] | list[str], AfterValidator(_names_one)]
"""``all-linear`` means every linear layer of the decoder except the output head."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The learning rates that are known to work for a tuning method.

    Attributes:
        default: rate of a recipe that does not set one.
        low: ``align check`` warns below this rate.
        high: ``align check`` warns above this rate.
        source: origin of the numbers, and which of them are our choice.
    """

    default: float
    low: float
    high: float
    source: str


LORA_RATES = Rates(
    2e-4,
    1e-4,
    3e-4,
    "1e-4 to 2e-4 from 7B to 65B (arXiv:2305.14314 appendix B), 2e-4 for GPT-3 (arXiv:2106.09685 "
    "appendix D), in Zephyr's qlora recipe and in TRL's example",
)
_PEFT = "peft's comparison of methods on Llama-3.2-3B (method_comparison/MetaMathQA)"


class TuningSpec(Variants):
    """Base of the methods; the class variables declare the capabilities of a method."""

    tag: ClassVar[str] = "method"
    variants: ClassVar[dict[str, type["TuningSpec"]]] = {}
    if TYPE_CHECKING:  # Each class has its own literal.
        method: str
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
    trains_rows: ClassVar[bool] = False
    """Rows of new tokens can be trained beside the adapter, while the embeddings are frozen."""
    served_ranks: ClassVar[tuple[int, ...]] = ()
    """Maximum ranks that vLLM can be configured for when it serves the adapter alone."""
    peft_type: ClassVar[str | None] = None
    """peft's name of an adapter that is saved separately."""
    builder: ClassVar[str | None] = None
    """``module:function`` that returns peft's configuration for a model and a spec, if it adds any
    module."""
    rates: ClassVar[Rates | None] = None
    """Learning rates in supervised stages (sft, reward, classify); None if none are known."""


class BesideTuning(TuningSpec):
    """Base of the methods whose adapter cannot be merged."""

    merges: ClassVar[bool] = False
    new_at_start: ClassVar[bool] = True
    in_trl: ClassVar[bool] = False


class VirtualTuning(BesideTuning):
    """Base of the methods that prepend virtual tokens to the text."""

    virtual: ClassVar[bool] = True
    inside_layers: ClassVar[bool] = False


class FullTuning(TuningSpec):
    """Train every weight."""

    rates: ClassVar[Rates | None] = Rates(
        2e-5,
        1e-5,
        5e-5,
        "2e-5 to 5e-5 for BERT (arXiv:1810.04805 appendix A.3), 2e-5 for Llama 2 "
        "(arXiv:2307.09288 section 3.1), DeepSeekMath's reward model (arXiv:2402.03300) and TRL's "
        "default of sft",
    )
    method: Literal["full"] = "full"


class HeadTuning(TuningSpec):
    """Freeze the backbone and train the new task head of a reward or classify stage."""

    inside_layers: ClassVar[bool] = False
    rates: ClassVar[Rates | None] = Rates(
        1e-3,
        1e-4,
        1e-2,
        "Adam's own 1e-3 (arXiv:1412.6980 algorithm 1) for a layer alone; a factor of 10 either "
        "way is our choice",
    )
    method: Literal["head"]


class LoraTuning(TuningSpec):
    """Add low-rank updates (arXiv:2106.09685).

    ``rslora`` scales by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732).
    """

    served_ranks: ClassVar[tuple[int, ...]] = (8, 16, 32, 64, 128, 256, 320, 512)
    trains_rows: ClassVar[bool] = True
    builder: ClassVar[str | None] = "align.tuning.configs:lora"
    rates: ClassVar[Rates | None] = LORA_RATES
    method: Literal["lora", "rslora"]
    rank: Count = 16
    """Rank of the updates."""
    alpha: Positive = 32.0
    """Scale of the updates, which are multiplied by alpha / rank (rslora: alpha / square root of
    rank)."""
    dropout: Rate = 0.0
    """Dropout probability on the adapter's inputs; must be 0 in stages with a reference policy."""
    targets: Targets = "all-linear"
    """Adapted linear layers: ``all-linear`` (all but the head), or endings like ``q_proj``."""


class DoraTuning(LoraTuning):
    """Train the norm of each output's weights separately from the direction (arXiv:2402.09353)."""

    served_ranks: ClassVar[tuple[int, ...]] = ()
    method: Literal["dora"]


class PissaTuning(TuningSpec):
    """Train the leading singular directions of each weight (arXiv:2404.02948), alpha = rank."""

    in_trl: ClassVar[bool] = False
    trains_rows: ClassVar[bool] = True
    builder: ClassVar[str | None] = "align.tuning.configs:pissa"
    rates: ClassVar[Rates | None] = Rates(
        2e-5,
        1e-5,
        5e-5,
        "2e-5 in its authors' scripts for Llama 2 (arXiv:2404.02948): it trains the leading part "
        "of the weights themselves",
    )
    method: Literal["pissa"]
    rank: Count = 16
    """Number of singular directions."""
    targets: Targets = "all-linear"
    """Adapted linear layers: ``all-linear`` (all but the head), or endings like ``q_proj``."""


class QloraTuning(TuningSpec):
    """Add low-rank updates to 4-bit weights, doubly quantized NF4 (arXiv:2305.14314)."""

    new_at_start: ClassVar[bool] = True
    in_trl: ClassVar[bool] = False
    trains_rows: ClassVar[bool] = True
    builder: ClassVar[str | None] = "align.tuning.configs:lora"
    rates: ClassVar[Rates | None] = LORA_RATES
    method: Literal["qlora"]
    rank: Count = 16
    """Rank of the updates."""
    alpha: Positive = 32.0
    """Scale of the updates, which are multiplied by alpha / rank (rslora: alpha / square root of
    rank)."""
    dropout: Rate = 0.0
    """Dropout probability on the adapter's inputs; must be 0 in stages with a reference policy."""
    targets: Targets = "all-linear"
    """Adapted linear layers: ``all-linear`` (all but the head), or endings like ``q_proj``."""


class Ia3Tuning(TuningSpec):
    """Scale keys, values and the inner MLP activations by trained vectors (arXiv:2205.05638)."""

    builder: ClassVar[str | None] = "align.tuning.configs:ia3"
    rates: ClassVar[Rates | None] = Rates(
        5e-3,
        1e-3,
        1e-2,
        f"3e-3 in its authors' configuration of T0 (arXiv:2205.05638, Adafactor), 5e-3 in {_PEFT}",
    )
    method: Literal["ia3"]


class OftTuning(TuningSpec):
    """Rotate the inputs of each weight by trained orthogonal blocks (arXiv:2306.07280)."""

    builder: ClassVar[str | None] = "align.tuning.configs:oft"
    rates: ClassVar[Rates | None] = Rates(
        1e-4, 3e-5, 3e-4, f"1e-4 in {_PEFT}; a factor of 3 either way is our choice"
    )
    method: Literal["oft"]
    block_size: Annotated[int, Field(ge=2)] = 32
    """Size of the blocks; must divide the input size of every target."""
    targets: Targets = "all-linear"
    """Adapted linear layers: ``all-linear`` (all but the head), or endings like ``q_proj``."""


class VeraTuning(TuningSpec):
    """Scale shared random low-rank matrices by trained vectors (arXiv:2310.11454)."""

    builder: ClassVar[str | None] = "align.tuning.configs:vera"
    rates: ClassVar[Rates | None] = Rates(
        1e-3,
        1e-4,
        2e-2,
        f"1e-4 in {_PEFT}, 2e-2 in peft's example for RoBERTa; the default in between is our "
        "choice",
    )
    method: Literal["vera"]
    rank: Count = 256
    """Rank of the shared random matrices."""
    targets: Targets = "all-linear"
    """Adapted linear layers: ``all-linear`` (all but the head), or endings like ``q_proj``."""


class BottleneckTuning(BesideTuning):
    """Insert small two-layer networks after attention and after the MLP (arXiv:1902.00751)."""

    continues: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "BOTTLENECK"
    builder: ClassVar[str | None] = "align.tuning.configs:bottleneck"
    rates: ClassVar[Rates | None] = Rates(
        3e-4,
        3e-5,
        3e-3,
        "3e-4 in its authors' example for BERT, the middle of the rates that they tried "
        "(arXiv:1902.00751 section 3)",
    )
    method: Literal["bottleneck"]
    size: Count = 64
    """Units of the inner layer."""


class PrefixTuning(VirtualTuning):
    """Train keys and values of virtual tokens in every layer by an MLP (arXiv:2101.00190)."""

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    builder: ClassVar[str | None] = "align.tuning.configs:prefix"
    rates: ClassVar[Rates | None] = Rates(
        1e-3,
        5e-5,
        5e-3,
        f"5e-5 in its authors' runs of GPT-2 (arXiv:2101.00190), 1e-3 and 5e-3 in {_PEFT}",
    )
    method: Literal["prefix"]
    virtual_tokens: Count = 16
    """Number of virtual tokens."""
    hidden: Count | None = None
    """Units of the MLP; None for the model's hidden size."""


class PromptTuning(VirtualTuning):
    """Train the embeddings of virtual tokens, initialized from real ones (arXiv:2104.08691)."""

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    builder: ClassVar[str | None] = "align.tuning.configs:prompt"
    rates: ClassVar[Rates | None] = Rates(
        1e-3,
        1e-3,
        3e-1,
        "0.3 for T5 (arXiv:2104.08691 section 3, Adafactor); with AdamW 1e-3 in "
        f"{_PEFT} and 3e-2 in its guide",
    )
    method: Literal["prompt"]
    virtual_tokens: Count = 16
    """Number of virtual tokens."""


class PtuningTuning(VirtualTuning):
    """Train virtual tokens whose embeddings are computed by an MLP (arXiv:2103.10385)."""

    peft_type: ClassVar[str | None] = "P_TUNING"
    builder: ClassVar[str | None] = "align.tuning.configs:ptuning"
    rates: ClassVar[Rates | None] = Rates(
        1e-4,
        3e-5,
        1e-3,
        f"1e-4 and, with an LSTM, 5e-4 in {_PEFT}; the ends of the range are our choice",
    )
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
    builder: ClassVar[str | None] = "align.tuning.configs:loreft"
    rates: ClassVar[Rates | None] = Rates(
        9e-4,
        3e-4,
        3e-3,
        "9e-4 in its authors' commands for Llama (arXiv:2404.03592); a factor of 3 either way is "
        "our choice",
    )
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


METHODS = TuningSpec.variants
"""Class of each method."""


POLICY_SOURCES = {
    "full": "5e-7 for Zephyr (its dpo recipe, arXiv:2310.16944), 1e-6 for DeepSeekMath "
    "(arXiv:2402.03300) and TRL's default of dpo, kto and grpo, 3e-6 for PPO (arXiv:2403.17031), "
    "5e-7 to 5e-6 in TRL's advice on kto",
    "lora": "5e-6 in Zephyr's qlora recipe of dpo, 1e-5 in TRL's advice on dpo and in its runs of "
    "grpo; the upper end is our choice",
}
"""Sources of the rates in policy optimization; other methods use the ratio of these two."""


def known_rates(family: str, method: str) -> Rates | None:
    """Return the known rates of a method in a family of stages; None for an unknown method.

    Policy optimization uses 1/20 of the supervised default, and a range from 1/20 of the lowest to
    1/10 of the highest rate. Published rates of full and LoRA training have this ratio.
    """
    found = METHODS[method].rates if method in METHODS else None
    if found is None or family == "supervised":
        return found
    source = POLICY_SOURCES.get(
        "lora" if found is LORA_RATES else method,
        f"1/20 to 1/10 of its supervised rates, as with full and lora, is our choice; those: "
        f"{found.source}",
    )
    scaled = (found.default / 20, found.low / 20, found.high / 10)
    # Three digits: 2e-5 / 20 is 1.0000000000000002e-06 otherwise.
    default, low, high = (float(f"{rate:.3g}") for rate in scaled)
    return Rates(default, low, high, source)


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
