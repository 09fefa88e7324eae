"""Blocks shared by several stages: data, tokenizer, optimizer, ZeRO, sampling, KL, clipping."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from align.recipe.schema.formats import FormatName
from reward_models.identity import Added, Aside, Formerly, Spec
from reward_models.specs import FUNCTION, Count, Positive, Ref, RewardSpec

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
"""Rows of one optimizer step; a typing error would draw rows for hours before the first."""


def _as_tuple(value: object) -> Any:
    """Return a list as a tuple; strict validation accepts lists for tuples in JSON mode only."""
    return tuple(value) if isinstance(value, list) else value


class DataSpec(Spec):
    """One data source: a file, glob, folder, URL or hub id (``path``), an earlier ``stage`` that
    writes data, exported ``labels``, or the synthetic ``world``."""

    path: str | None = None
    """File, glob, folder, URL (docs/file-formats.md) or hub id."""
    stage: Annotated[str | None, Ref("data")] = None
    """Earlier stage that writes data."""
    labels: Annotated[
        str | None, Field(pattern=r"^[A-Za-z0-9][\w.-]*(@[0-9]+)?$"), Added("0.2")
    ] = None
    """Labeling project: its newest exported snapshot, or snapshot N with ``NAME@N``
    (docs/labels.md)."""
    world: Literal["corpus", "sft", "preference", "prompts"] | None = None
    """Synthetic data of this kind, for tests and examples."""
    tasks: list[Literal["arithmetic", "sort", "reverse", "count", "pick"]] = []
    """Synthetic tasks that the rows are drawn from; an empty list means all five."""
    rows: Count | None = None
    """Number of rows, drawn at random; None for all. Needed with ``world``."""
    format: FormatName = "auto"
    """Layout of the rows; ``auto`` detects it from their keys."""
    map: Annotated[str | None, Field(pattern=FUNCTION)] = None
    """Function ``FILE.py:NAME`` or ``MODULE:NAME`` that gets each row, and returns a row, a list of
    rows, or None to leave it out (docs/own-code.md)."""
    rename: dict[str, str] = {}
    """Renamed fields, ``{old: new}``, after ``map``; ``outer.inner`` is in a nested object."""
    strings: Literal["text", "chat"] = "text"
    """Use plain prompt and response strings unchanged, or as turns of the chat template."""
    split: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "all"
    """``all``, or ``train`` or ``heldout`` by a hash of the prompt; for data with its own splits
    (a dataset repository, a folder of save_to_disk, a hub id), the name of one of them."""
    config: str | None = None
    """Configuration of a dataset repository or hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    heldout_frac: Fraction = 0.1
    """Fraction of the prompts on the ``heldout`` side of ``split``."""
    weight: Positive = 1.0
    """Relative weight of this source in a mixture of several."""
    answers: Literal["chosen", "both"] | None = None
    """Convert preference pairs to sft rows: one of the chosen response, or one of each response.
    ``both`` teaches the format of responses, not the preference between them."""
    templates: str | None = None
    """YAML file of Jinja2 templates that phrase each row as an instruction (arXiv:2109.01652)."""
    phrasing: Literal["one", "all"] | None = None
    """Use one random template per row (the default), or every template."""

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        if [self.path, self.stage, self.labels, self.world].count(None) != 3:
            raise ValueError("give exactly one of 'path', 'stage', 'labels' and 'world'")
        sides = ("all", "train", "heldout")
        if self.path is None and self.split not in sides:
            raise ValueError(f"split: expected one of {', '.join(sides)}, found '{self.split}'")
        if self.world is not None and self.answers is not None:
            raise ValueError("'answers' is for files of preference pairs; use world: sft")
        return self


def refuse_answers(specs: list[DataSpec], kind: str) -> None:
    """Raise ValueError if ``answers`` is set on data that is not for sft."""
    if any(spec.answers is not None for spec in specs):
        raise ValueError(f"'answers' makes sft rows and has no effect in a {kind} stage; remove it")


class TokenizerSpec(Spec):
    """Settings that the tokenizer lacks; special tokens are added and saved with the artifact."""

    pad_token: str | None = None
    """Padding token; None keeps the tokenizer's own."""
    stop_token: str | None = None
    """Token that ends a response; None keeps the model's own."""
    chat_template: str | None = None
    """``plain``, ``chatml``, ``llama3``, ``qwen2_5``, ``qwen3``, ``qwen3_instruct``, ``gemma3``,
    ``gpt_oss`` or a path to a Jinja file; None keeps the tokenizer's own."""
    append_stop: bool = False
    """Extend the saved template so that every assistant turn ends in the stop token."""


class BuildSpec(Spec):
    """Size of a small Qwen2-architecture model and of the tokenizer trained for it."""

    vocab_size: Annotated[int, Field(ge=64)] = 512
    """Tokens of the byte-level BPE vocabulary."""
    hidden_size: Count = 128
    """Width of the hidden states."""
    num_layers: Count = 4
    """Number of decoder layers."""
    num_heads: Count = 4
    """Query heads of each layer."""
    num_kv_heads: Count = 2
    """Key and value heads of each layer (grouped-query attention)."""
    intermediate_size: Count = 384
    """Width of the MLP's inner activations."""
    max_positions: Count = 256
    """Maximum number of tokens of a sequence."""
    init_std: Positive = 0.06
    """Standard deviation of the initial weights. The usual 0.02 is smaller, and models of this size
    learn to copy slowly with it."""


class OptimSpec(Spec):
    """AdamW and its learning-rate schedule."""

    learning_rate: Annotated[float, Field(gt=0.0, le=1e3)] = 1e-5
    """Peak learning rate; the default depends on the method (docs/tuning.md)."""
    warn_rate: Annotated[bool, Aside()] = True
    """Warn if ``learning_rate`` is outside the range that is known to work for the method."""
    schedule: Literal["constant", "linear", "cosine", "slanted"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_frac: Fraction = 0.03
    """Fraction of the steps over which the learning rate rises linearly to its peak."""
    min_lr_frac: Fraction = 0.0
    """Rate after the last step, as a fraction of the peak."""
    cut_frac: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Fraction of the steps in which ``slanted`` rises before it falls (arXiv:1801.06146 eq. 3)."""
    ratio: Annotated[float, Field(gt=1.0)] = 32.0
    """Ratio of the peak rate of ``slanted`` to its smallest rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of matrices (arXiv:1711.05101); none on norms and biases."""
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    eps: Positive = 1e-8
    """Term that AdamW adds to the denominator."""
    max_grad_norm: Positive = 1.0
    """Global gradient norm above which gradients are scaled down."""


class ZeroSpec(Spec):
    """DeepSpeed ZeRO stage: 0 none, 1 optimizer states, 2 + gradients, 3 + parameters."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage: 0 shards nothing over the ranks, 1 the optimizer states, 2 also the gradients, 3
    also the parameters."""
    offload: Literal["none", "cpu"] = "none"
    """Keep the optimizer states in CPU memory."""


class ParallelSpec(Spec):
    """Parallelism beyond that of data and ZeRO."""

    sequence: Count = 1
    """Number of consecutive ranks that split the tokens of each row (sequence parallelism), for
    rows too long for one device. Must divide ``ranks`` and the model's number of key-value heads
    (arXiv:2309.14509)."""


class SamplingSpec(Spec):
    """How responses are sampled, and by which engine."""

    engine: Literal["auto", "vllm", "hf"] = "auto"
    """``auto``: vLLM where it is installed and serves the model, else transformers."""
    max_new_tokens: Count = 128
    """Maximum tokens of a response."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Divisor of the logits; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Sample from the most probable tokens with this total probability."""
    memory_frac: Annotated[Fraction | None, Formerly(0.3)] = None
    """Fraction of the accelerator's memory for the engine's weights and cache. None computes it at
    the start from the free memory and what the stage will hold beside the engine."""
    cache_gib: Positive = 0.5
    """Size of the engine's key-value cache on CPU, in GiB."""
    tensor_parallel: Annotated[Count, Added("0.2")] = 1
    """Number of consecutive ranks that share one vLLM engine, each with a part of the weights. Must
    divide ``ranks`` and the model's number of key-value heads."""
    max_num_seqs: Annotated[Count | None, Added("0.2")] = None
    """Maximum number of responses that vLLM decodes at the same time. None is 256 on the CPU, and
    vLLM's own default on a GPU."""
    cache_dtype: Annotated[Literal["auto", "fp8", "fp8_e5m2"], Added("0.2")] = "auto"
    """Dtype of vLLM's key-value cache: that of the weights, or 8-bit floats, which take half of the
    memory of bfloat16 and round keys and values."""


class OnlineSampling(SamplingSpec):
    """Sampling of an online stage, and how the engine gets the policy's weights."""

    push: Literal["merged", "adapter"] = "merged"
    """Before each step, send vLLM all weights with the adapter merged, or the adapter alone."""


class KlSpec(Spec):
    """The KL penalty to the reference policy: its place, coefficient and estimator."""

    coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the penalty; 0 for none."""
    place: Literal["reward", "loss"] = "reward"
    """Subtract the penalty from the reward, or add it to the loss."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL per token (http://joschu.net/blog/kl-approx.html)."""
    corrected: bool = False
    """Weight k3 in the loss by policy / old policy, including its gradient, so that the gradient is
    that of KL(policy || reference) also off-policy (arXiv:2512.02556)."""
    target: Positive | None = None
    """KL in nats per response that adaptive control aims at (arXiv:1909.08593); None keeps ``coef``
    fixed."""
    horizon: Positive = 10000.0
    """Responses over which adaptive control can change the coefficient by up to 20 %."""

    @model_validator(mode="after")
    def _legal(self) -> "KlSpec":
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "k1 in the loss has zero expected gradient; use k2 or k3, or place: reward"
            )
        if self.place == "reward" and self.estimator != "k1":
            raise ValueError(
                f"{self.estimator} in the reward does not have the gradient of the KL; use "
                "estimator: k1, or place: loss"
            )
        if self.corrected and (self.place, self.estimator) != ("loss", "k3"):
            raise ValueError("'corrected' needs place: loss and estimator: k3; remove it")
        return self


class ClipSpec(Spec):
    """Clipping of the policy ratio to [1 - low, 1 + high].

    Reference: arXiv:1707.06347; high > low: arXiv:2503.14476.
    """

    low: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Distance of the lower bound from 1; 1.0 means no lower bound."""
    high: Positive = 0.2
    """Distance of the upper bound from 1."""
    dual: Annotated[float, Field(gt=1.0)] | None = None
    """Upper bound of the ratio for negative advantages (arXiv:1912.09729), usually 3."""


class ImportanceSpec(Spec):
    """Importance weights for the difference between sampler and trainer log-probabilities."""

    mode: Literal["none", "truncate", "mask"] = "truncate"
    """``truncate`` caps the weights at ``cap``; ``mask`` excludes what lies outside the bounds from
    the loss; ``none`` applies no weights."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """Unit of one weight: a token; a response, by the product over its tokens; a response, by their
    geometric mean (biased, but it does not explode with the length)."""
    cap: Annotated[float, Field(gt=1.0)] = 2.0
    """Largest weight, or largest ratio that ``mask`` keeps."""
    floor: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Smallest ratio that ``mask`` keeps; None is 1 / cap."""


class OverlongSpec(Spec):
    """Penalty of responses close to the length limit (DAPO, arXiv:2503.14476 eq. 13)."""

    buffer_frac: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Last fraction of max_new_tokens, in which the penalty grows from 0 to ``penalty``."""
    penalty: Positive = 1.0
    """Amount subtracted from the score of a response at the limit."""


def refuse_prefill(rewards: list[RewardSpec], kind: str) -> None:
    """Raise ValueError if a reward expects a template's beginning where no template is applied."""
    for reward in rewards:
        if reward.prefill:
            raise ValueError(
                f"reward '{reward.label}': 'prefill' has no effect in a {kind} stage; remove it"
            )


def distinct_names(rewards: list[RewardSpec]) -> None:
    """Raise ValueError if two rewards have the same name, which is also their column."""
    names = [reward.label for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rewards have the name '{name}'; give each its own 'name'")
