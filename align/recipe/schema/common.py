"""Parts of stage specs: the strict base class, data, tokenizer, optimiser, ZeRO, sampling, KL."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from reward_models.specs import Count, Positive, Ref, RewardSpec, Spec

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _as_tuple(value: Any) -> Any:
    """Take a list for a tuple also where it is no JSON any more: after a stage's presets."""
    return tuple(value) if isinstance(value, list) else value


class DataSpec(Spec):
    """Name one data source: a file, glob, folder or hub id (``path``), an earlier ``stage`` that
    writes data, or the made ``world``."""

    path: str | None = None
    stage: Annotated[str | None, Ref("data")] = None
    world: Literal["corpus", "sft", "preference", "prompts"] | None = None
    tasks: list[Literal["arithmetic", "sort", "reverse", "count", "pick"]] = []
    """Tasks of the world that rows are drawn from; empty is all five."""
    rows: Count | None = None
    format: Literal[
        "auto",
        "messages",
        "prompt_completion",
        "preference",
        "unpaired",
        "prompt",
        "alpaca",
        "sharegpt",
        "openai",
        "openai_dpo",
        "hh",
        "ultrafeedback",
        "text",
        "seed_tasks",
        "oasst",
        "model_solutions",
        "steps",
        "classes",
        "dolly",
        "question_answer",
        "segments",
        "verl",
    ] = "auto"
    rename: dict[str, str] = {}
    """Fields by new names, ``{old: new}``; ``outer.inner`` is a field of a nested object."""
    strings: Literal["text", "chat"] = "text"
    """Plain prompt and answer texts: as they stand, or as turns by the chat template."""
    split: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "all"
    """``all``, or ``train`` or ``heldout`` by a hash of the prompt; for data that has splits of its
    own (a data set repository, a folder of save_to_disk, a hub id), the name of one of them."""
    config: str | None = None
    """Configuration of a data set repository or hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    heldout_frac: Fraction = 0.1
    weight: Positive = 1.0
    answers: Literal["chosen", "both"] | None = None
    """Make sft rows of preference pairs: one of the chosen answer, or one of each answer.
    ``both`` teaches in what form to answer and not which answer is preferred."""
    templates: str | None = None
    """YAML file of Jinja2 templates that word each row as an instruction (FLAN, 2109.01652)."""
    phrasing: Literal["one", "all"] | None = None
    """Each row in one wording, drawn by the seed (the default), or in every wording."""

    @model_validator(mode="after")
    def _one_source(self) -> "DataSpec":
        if [self.path, self.stage, self.world].count(None) != 2:
            raise ValueError("give exactly one of 'path', 'stage' and 'world'")
        sides = ("all", "train", "heldout")
        if self.path is None and self.split not in sides:
            raise ValueError(f"split: expected one of {', '.join(sides)}, found '{self.split}'")
        if self.path is None and (self.config is not None or self.revision is not None):
            raise ValueError("'config' and 'revision' are those of a 'path'; remove them")
        if self.world is not None and self.answers is not None:
            raise ValueError("'answers' is for files of preference pairs; use world: sft")
        if self.tasks and self.world is None:
            raise ValueError("'tasks' are those of the made world; remove it")
        if self.world is not None and self.templates is not None:
            raise ValueError("'templates' word the rows of files; world rows are worded already")
        return self


def refuse_answers(specs: list[DataSpec], kind: str) -> None:
    """Raise ValueError where ``answers`` would have no effect: on data that is not for sft."""
    if any(spec.answers is not None for spec in specs):
        raise ValueError(f"'answers' makes sft rows and has no effect in a {kind} stage; remove it")


class TokenizerSpec(Spec):
    """Say what the tokenizer lacks: special tokens are added and saved with the artefact."""

    pad_token: str | None = None
    stop_token: str | None = None
    chat_template: str | None = None
    """``plain``, ``chatml``, ``llama3``, ``qwen2_5``, ``qwen3``, ``qwen3_instruct``, ``gemma3``,
    ``gpt_oss`` or a path to a Jinja file; None keeps the tokenizer's own."""
    append_stop: bool = False
    """Let the saved template end every assistant turn in the stop token, where it writes none."""


class BuildSpec(Spec):
    """Describe a small Qwen2-architecture model and the tokenizer trained for it."""

    vocab_size: Annotated[int, Field(ge=64)] = 512
    hidden_size: Count = 128
    num_layers: Count = 4
    num_heads: Count = 4
    num_kv_heads: Count = 2
    intermediate_size: Count = 384
    max_positions: Count = 256
    init_std: Positive = 0.06
    """Wider than the usual 0.02, with which models this small are slow to learn to copy."""


class OptimSpec(Spec):
    """Describe AdamW and its learning-rate schedule."""

    learning_rate: Positive = 1e-5
    schedule: Literal["constant", "linear", "cosine", "slanted"] = "cosine"
    warmup_frac: Fraction = 0.03
    min_lr_frac: Fraction = 0.0
    cut_frac: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the steps in which ``slanted`` rises; then it falls (arXiv:1801.06146 eq. 3)."""
    ratio: Annotated[float, Field(gt=1.0)] = 32.0
    """Peak of ``slanted`` over its smallest rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_tuple)] = (0.9, 0.999)
    eps: Positive = 1e-8
    max_grad_norm: Positive = 1.0


class ZeroSpec(Spec):
    """Choose DeepSpeed ZeRO: 0 none, 1 optimiser states, 2 + gradients, 3 + parameters."""

    stage: Annotated[int, Field(ge=0, le=3)] = 0
    offload: Literal["none", "cpu"] = "none"


class SamplingSpec(Spec):
    """Say how answers are drawn and by which engine."""

    engine: Literal["auto", "vllm", "hf"] = "auto"
    max_new_tokens: Count = 128
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    memory_frac: Fraction = 0.3
    """Share of the accelerator's memory for the engine's weights and cache."""
    cache_gib: Positive = 0.5
    """Key-value cache of the engine on CPU, in GiB."""


class OnlineSampling(SamplingSpec):
    """Say also how the policy that is trained comes to the engine."""

    push: Literal["merged", "adapter"] = "merged"
    """Before each step vLLM gets whole weights, an adapter merged in, or the adapter alone."""


class KlSpec(Spec):
    """Say where the KL to the reference goes and how it is estimated."""

    coef: Annotated[float, Field(ge=0.0)] = 0.0
    place: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3"] = "k1"
    corrected: bool = False
    """Weigh k3 in the loss by policy / old policy, with gradient: that of KL(policy || reference)
    also off-policy (arXiv:2512.02556)."""
    target: Positive | None = None
    """Aim of the adaptive controller in nats per answer (arXiv:1909.08593); None keeps coef."""
    horizon: Positive = 10000.0

    @model_validator(mode="after")
    def _legal(self) -> "KlSpec":
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "k1 in the loss has zero expected gradient; use k2 or k3, or place: reward"
            )
        if self.corrected and (self.place, self.estimator) != ("loss", "k3"):
            raise ValueError("'corrected' needs place: loss and estimator: k3; remove it")
        return self


class ClipSpec(Spec):
    """Bound the policy ratio to [1 - low, 1 + high] (arXiv:1707.06347; high > low: 2503.14476)."""

    low: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """1.0 sets no lower bound."""
    high: Positive = 0.2
    dual: Annotated[float, Field(gt=1.0)] | None = None
    """Bound of the ratio where the advantage is negative (arXiv:1912.09729), usually 3."""


class ImportanceSpec(Spec):
    """Correct the difference between the sampler's and the trainer's log-probabilities."""

    mode: Literal["none", "truncate", "mask"] = "truncate"
    level: Literal["token", "sequence", "geometric"] = "token"
    """What one weight speaks of: a token; an answer, by the product over its tokens; an answer, by
    their geometric mean (biased, but it does not explode with the length)."""
    cap: Annotated[float, Field(gt=1.0)] = 2.0
    floor: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Lower end of what ``mask`` keeps; None is 1 / cap."""


class OverlongSpec(Spec):
    """Lower the score of answers near the length limit (DAPO, arXiv:2503.14476 eq. 13)."""

    buffer_frac: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Last share of max_new_tokens in which the penalty grows from 0 to all of it."""
    penalty: Positive = 1.0
    """Points taken from the score of an answer at the limit."""


def distinct_names(rewards: list[RewardSpec]) -> None:
    """Raise ValueError where two rewards would write one column."""
    names = [reward.name or reward.kind for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rewards are called '{name}'; give each its own 'name'")
