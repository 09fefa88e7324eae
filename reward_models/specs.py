"""Settings of each reward: one class per kind, the only source of its keys and defaults.

Recipes and ``build_reward`` are validated by these classes. They are here and not in the recipe's
schema because nothing in this package imports ``align``. Neither torch nor any other heavy library
is imported.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args

from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from reward_models.identity import Spec

Positive = Annotated[float, Field(gt=0.0, le=1e12)]
Count = Annotated[int, Field(ge=1, le=10**12)]
FUNCTION = r"^[^:\s][^:]*:[A-Za-z_]\w*$"
"""Pattern of ``FILE.py:NAME`` and ``MODULE:NAME``."""


class Variants(Spec):
    """Base of specifications of one sort, such as all rewards; defining a subclass registers it.

    A base has ``tag``, the key that selects the class, and ``variants``, an empty dictionary. Each
    subclass that declares the tag as a literal is entered there. A field annotated with the base
    accepts every class that is registered when a value is validated, wherever the class is defined.
    """

    tag: ClassVar[str]
    variants: ClassVar[dict[str, type[Any]]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.tag not in cls.__annotations__:  # a base without a name of its own
            return
        for name in get_args(cls.model_fields[cls.tag].annotation):
            if name in cls.variants:
                other = cls.variants[name]
                raise TypeError(f"{cls.tag} '{name}' is defined twice: {other} and {cls}")
            cls.variants[name] = cls

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        if "variants" not in cls.__dict__:
            return handler(source)
        return core_schema.with_info_plain_validator_function(cls._read)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        # The classes may contain each other: ``align.recipe.reference`` writes the references.
        return {"variants": cls.__name__} if "variants" in cls.__dict__ else handler(schema)

    @classmethod
    def _read(cls, value: object, info: ValidationInfo) -> Any:
        adapter = _union(cls.tag, tuple(dict.fromkeys(cls.variants.values())))
        if info.mode == "json":
            # Only in JSON does strict validation accept a list for a tuple.
            return adapter.validate_json(json.dumps(value), strict=True)
        return adapter.validate_python(value)


@cache
def _union(tag: str, classes: tuple[type[Any], ...]) -> TypeAdapter[Any]:
    """Return the validator of any of the classes, which the value of ``tag`` selects."""
    return TypeAdapter(Annotated[Union[classes], Field(discriminator=tag)])  # noqa: UP007  # pyright: ignore


@dataclass(frozen=True, slots=True, init=False)
class Ref:
    """Mark a field that names an artifact: a folder or, in a recipe, the stage that writes it.

    Attributes:
        kinds: allowed kinds of the artifact, such as ``policy``.
    """

    kinds: tuple[str, ...]

    def __init__(self, *kinds: str) -> None:
        object.__setattr__(self, "kinds", kinds)


class EndpointSpec(Spec):
    """A language model behind an OpenAI-compatible API, and how it is asked."""

    url: str
    """Base URL of the API, such as http://127.0.0.1:8000/v1."""
    model: str
    """Name of the model, as the API lists it."""
    api_key_env: str | None = None
    """Environment variable that contains the key; None sends none."""
    max_tokens: Count = 256
    """Maximum tokens of a reply."""
    concurrency: Count = 8
    """Maximum number of requests at the same time."""
    timeout_s: Positive = 60.0
    """Limit of one request, in seconds."""
    deadline_s: Positive = 3600.0
    """Limit of all requests of one call, including retries, in seconds."""
    retries: Annotated[int, Field(ge=0)] = 4
    """Further attempts after a request that fails."""
    cache: str | None = "runs/judge-cache"
    """Folder of cached verdicts, by the hash of the request; null disables the cache."""
    dollars_per_million: tuple[float, float] = (0.0, 0.0)
    """Prices of a million prompt tokens and of a million response tokens, in US dollars."""


class RewardSpec(Variants):
    """Settings of every reward, and where the reward is built."""

    tag: ClassVar[str] = "kind"
    variants: ClassVar[dict[str, type["RewardSpec"]]] = {}
    builder: ClassVar[str]
    """``module:function`` that returns the reward for a spec; imported on use, as it may need
    torch."""
    weight: float = 1.0
    """Factor of this reward in the sum; 0 only measures it."""
    name: str | None = None
    """Name in metrics and tables; None for the kind."""
    prefill: bool = False
    """Score a response together with what the chat template writes at its beginning, such as
    ``<think>``."""
    if TYPE_CHECKING:  # each class has its own
        kind: str

    @property
    def label(self) -> str:
        """Return the reward's name in tables and metrics: its own, or its kind."""
        return self.name or self.kind


def _refuse_prefill(spec: RewardSpec) -> None:
    if spec.prefill:
        raise ValueError(
            f"'prefill' has no effect on a {spec.kind} reward: its own chat template writes the "
            "beginning of the response; remove it"
        )


class ScalarSpec(RewardSpec):
    """Score with a trained reward model: the name of a reward stage or the path of an artifact."""

    builder: ClassVar[str] = "reward_models.learned:build_scalar"
    kind: Literal["scalar"]
    model: Annotated[str, Ref("reward_model")]
    """Reward stage, or folder of a reward model."""
    normalize: bool = True
    """Normalize scores by the mean and standard deviation that were measured after training."""
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """How the scores of several heads are combined."""
    kappa: Annotated[float, Field(ge=0.0)] = 1.0
    """Number of standard deviations that ``mean_minus_std`` subtracts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the backbone's weights; the head computes in float32."""

    @model_validator(mode="after")
    def _sees_the_response(self) -> "ScalarSpec":
        _refuse_prefill(self)
        return self


class ProcessSpec(RewardSpec):
    """Score solutions step by step with a reward stage that has ``supervision: steps``."""

    builder: ClassVar[str] = "reward_models.process:build_process"
    kind: Literal["process"]
    model: Annotated[str, Ref("reward_model")]
    """Reward stage with ``supervision: steps``, or folder of such a model."""
    aggregate: Literal["min", "last", "product"] = "min"
    """How the probabilities of a solution's steps become one score (arXiv:2305.20050)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the backbone's weights; the head computes in float32."""

    @model_validator(mode="after")
    def _sees_the_response(self) -> "ProcessSpec":
        _refuse_prefill(self)
        return self


class ExactMatchSpec(RewardSpec):
    """Score 1 if the response (or what ``pattern`` captures of it) equals the column's value."""

    builder: ClassVar[str] = "reward_models.rules:exact_match"
    kind: Literal["exact_match"]
    column: str = "answer"
    """Column of the row with the expected text."""
    pattern: str | None = None
    """Regular expression whose first group is compared; None compares the whole response."""
    ignore_case: bool = True
    """Treat upper and lower case as equal."""


class MetricSpec(RewardSpec):
    """Score by a metric of the ``evaluate`` library, such as ROUGE, against a reference."""

    builder: ClassVar[str] = "reward_models.metric:build_metric"
    kind: Literal["metric"]
    path: Annotated[str, Field(min_length=1)]
    """File or folder of the metric, or its name on the Hugging Face Hub, whose code is then run."""
    config: str | None = None
    """Configuration of the metric, if it has several."""
    key: str | None = None
    """Entry of the metric's result that is the score, such as ``rougeL``; None if there is only
    one."""
    column: str = "reference"
    """Column of the row with the reference, in the form that the metric expects."""
    args: dict[str, Any] = {}
    """Additional arguments of the metric."""

    @property
    def label(self) -> str:
        """Return the reward's name in tables and metrics: its own, or the metric's."""
        return self.name or self.key or PurePath(self.path).stem


class RegexSpec(RewardSpec):
    """Score 1 if ``pattern`` is found in the response."""

    builder: ClassVar[str] = "reward_models.rules:regex_found"
    kind: Literal["regex"]
    pattern: str
    """Regular expression that is searched for."""


class FormatSpec(RewardSpec):
    """Score 1 if the whole response matches ``pattern``."""

    builder: ClassVar[str] = "reward_models.rules:format_matches"
    kind: Literal["format"]
    pattern: str
    """Regular expression that must match from beginning to end."""


class LengthSpec(RewardSpec):
    """Score 1 up to ``target`` words, falling linearly to 0 at ``limit`` words."""

    builder: ClassVar[str] = "reward_models.rules:length"
    kind: Literal["length"]
    target: Count
    """Maximum number of words that scores 1."""
    limit: Count
    """Number of words at which the score reaches 0."""


class RepetitionSpec(RewardSpec):
    """Score the fraction of the response's n-grams that are distinct."""

    builder: ClassVar[str] = "reward_models.rules:repetition"
    kind: Literal["repetition"]
    ngram: Count = 3
    """Number of words of an n-gram."""


class RefusalSpec(RewardSpec):
    """Score 1 if the response declines exactly when the column's value is in ``declines``."""

    builder: ClassVar[str] = "reward_models.refusals:refusal"
    kind: Literal["refusal"]
    column: str = "label"
    """Column of the row with its label."""
    declines: list[str] = Field(min_length=1)
    """Labels of the requests that should be declined."""


class MathSpec(RewardSpec):
    """Score 1 if the final number (or LaTeX expression) equals the column's value."""

    builder: ClassVar[str] = "reward_models.math:build_math"
    kind: Literal["math"]
    column: str = "answer"
    """Column of the row with the expected number or expression."""
    latex: bool = False
    """Compare LaTeX expressions too, by the package math-verify."""
    timeout_s: Positive = 5.0
    """Limit of one comparison by math-verify, in seconds."""


class RemoteSpec(RewardSpec):
    """Score on a server started by ``align serve-reward``."""

    builder: ClassVar[str] = "reward_models.remote:build_remote"
    kind: Literal["remote"]
    url: str
    """Address of the server, such as http://127.0.0.1:8765."""
    deadline_s: Positive = 60.0
    """Limit of one request including retries, in seconds."""
    retries: Annotated[int, Field(ge=0)] = 4
    """Further attempts after a request that fails."""
    max_failures: Count = 3
    """Number of consecutive requests without a reply after which the stage ends."""
    token_ids: bool = False
    """Send the sampled token ids too, if policy and scorer share a tokenizer."""


class JudgeSpec(RewardSpec):
    """Grade each response with a language model behind an OpenAI-compatible API."""

    builder: ClassVar[str] = "reward_models.judging:build_judge"
    kind: Literal["judge"]
    endpoint: EndpointSpec
    """The model that grades."""
    criteria: str = "Judge whether it helps: correct, on the question, clear."
    """What the judge is told to grade."""
    scale: tuple[int, int] = (1, 10)
    """Worst and best grade; the score is the grade's relative position between them, in [0, 1]."""
    reference: str | None = None
    """Column with a reference answer that is shown to the judge."""

    @model_validator(mode="after")
    def _scale_rises(self) -> "JudgeSpec":
        if self.scale[0] >= self.scale[1]:
            raise ValueError("scale: the best grade must be above the worst")
        return self


class PythonSpec(RewardSpec):
    """Score with a user-defined function that follows TRL's, verl's or OpenRLHF's convention."""

    builder: ClassVar[str] = "reward_models.own:build_python"
    kind: Literal["python"]
    path: Annotated[str, Field(pattern=FUNCTION)]
    """``FILE.py:FUNCTION``, relative to the recipe's folder, or ``MODULE:FUNCTION``, or a class."""
    args: dict[str, Any] = {}
    """Keyword arguments of the function, or of the class constructor."""
    deadline_s: Positive = 30.0
    """Limit of one call, in seconds; then the function's process is killed and restarted."""
    memory_gib: Positive = 8.0
    """Memory limit of the process, in GiB."""

    @property
    def label(self) -> str:
        """Return the reward's name in tables and metrics: its own, or the function's."""
        return self.name or self.path.rpartition(":")[2]


class CodeSpec(RewardSpec):
    """Score 1 if the Python program of the response passes the tests of its row, in a sandbox."""

    builder: ClassVar[str] = "reward_models.code:build_code"
    kind: Literal["code"]
    column: str | None = None
    """Column of the row with its tests; None finds it (docs/own-code.md lists the layouts)."""
    partial: bool = False
    """Score the fraction of the tests that pass, instead of 1 only if all do."""
    timeout_s: Positive = 10.0
    """Limit of a program in seconds of CPU time; the limit in wall-clock time is three times as
    long."""
    memory_gib: Positive = 1.0
    """Memory limit of each process of a program, in GiB; there can be eight."""
    workers: Count | None = None
    """Number of programs that run at the same time; None uses this rank's part of the CPU cores."""
    isolation: Literal["required", "limits"] = "required"
    """``limits`` is for machines without namespaces: no network and the same limits, but the
    program can reach all that the user who trains can, its tests too."""


class EnsembleSpec(RewardSpec):
    """Combine rewards that rate the same property."""

    builder: ClassVar[str] = "reward_models.ensemble:build_ensemble"
    kind: Literal["ensemble"]
    members: list[RewardSpec] = Field(min_length=2)
    """The combined rewards; the ``weight`` of each multiplies its score first."""
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """Mean, minimum, or mean minus ``kappa`` standard deviations of the scores."""
    kappa: Annotated[float, Field(ge=0.0)] = 1.0
    """Number of standard deviations that ``mean_minus_std`` subtracts."""

    @model_validator(mode="after")
    def _one_text(self) -> "EnsembleSpec":
        if any(member.prefill for member in self.members):
            raise ValueError("'prefill' of a member has no effect; set it on the ensemble")
        return self


def read_spec(given: Mapping[str, Any]) -> RewardSpec:
    """Return the specification that a plain mapping describes, with defaults filled in.

    Raises:
        ValueError: the kind or a key is unknown, a key is missing, or a value is invalid.
    """
    known, kind = RewardSpec.variants, given.get("kind")
    if kind not in known:
        raise ValueError(f"reward kind {kind!r} is unknown; use one of {', '.join(known)}")
    try:
        return TypeAdapter(RewardSpec).validate_python(dict(given))
    except ValidationError as error:
        found = [_problem(e, known) for e in error.errors(include_url=False)]
        name = given.get("name") or kind
        raise ValueError(f"reward '{name}': {'; '.join(found)}") from None


def _problem(error: Mapping[str, Any], known: Mapping[str, type[RewardSpec]]) -> str:
    # pydantic includes the kind of each reward in the location.
    path = [str(part) for part in error["loc"] if part not in known]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        # Follow the location to the class that has the key, for a suggestion.
        owner: Any = None
        for part in error["loc"][:-1]:
            inner = getattr(owner, "model_fields", {}).get(part)
            owner = known.get(part) or (inner.annotation if inner else owner)
        near = get_close_matches(path[-1], owner.model_fields, n=1)
        return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")
    if error["type"] == "missing":
        return f"'{key}' is missing"
    where = f"{key}: " if key else ""
    return f"{where}found {error['input']!r}; {error['msg']}"
