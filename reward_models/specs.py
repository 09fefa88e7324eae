"""What each reward can be told: one class per kind, the one source of its keys and defaults.

A recipe is checked by these classes, and ``build_reward`` by the same. They stand here and not with
the rest of the recipe's schema because nothing in this package imports ``align``; neither torch nor
any other heavy library is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class Spec(BaseModel):
    """Base of every specification: unknown keys and later changes are refused."""

    # Deferred: only the recipe as a whole is ever validated, and building each class takes time.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


@dataclass(frozen=True, slots=True, init=False)
class Ref:
    """Mark of a field that names an artifact: a folder, or in a recipe the stage that writes it.

    Attributes:
        kinds: what the artifact may be, such as ``policy``.
    """

    kinds: tuple[str, ...]

    def __init__(self, *kinds: str) -> None:
        object.__setattr__(self, "kinds", kinds)


class EndpointSpec(Spec):
    """Name a language model behind an OpenAI-compatible API, and how it is asked."""

    url: str
    """Base of the API, such as http://127.0.0.1:8000/v1."""
    model: str
    api_key_env: str | None = None
    """Environment variable that holds the key; None sends none."""
    max_tokens: Count = 256
    concurrency: Count = 8
    timeout_s: Positive = 60.0
    deadline_s: Positive = 3600.0
    retries: Annotated[int, Field(ge=0)] = 4
    cache: str | None = "runs/judge-cache"
    """Folder of the verdicts by the hash of what was asked; null keeps none."""
    dollars_per_million: tuple[float, float] = (0.0, 0.0)
    """Prices of a million prompt tokens and of a million answer tokens."""


class RewardBase(Spec):
    """Hold what every reward has."""

    weight: float = 1.0
    name: str | None = None
    if TYPE_CHECKING:  # each class has its own
        kind: str

    @property
    def label(self) -> str:
        """The reward's name in tables and metrics: its own, or its kind."""
        return self.name or self.kind


class ScalarSpec(RewardBase):
    """Score with a trained reward model: a reward stage's name or an artefact's path."""

    kind: Literal["scalar"]
    model: Annotated[str, Ref("reward_model")]
    normalise: bool = True
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """How the scores of a model with several heads become one."""
    kappa: Annotated[float, Field(ge=0.0)] = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the backbone's weights; the head computes in float32."""


class ProcessSpec(RewardBase):
    """Score solutions step by step: a reward stage with ``supervision: steps``."""

    kind: Literal["process"]
    model: Annotated[str, Ref("reward_model")]
    aggregate: Literal["min", "last", "product"] = "min"
    dtype: Literal["float32", "bfloat16"] = "float32"


class ExactMatchSpec(RewardBase):
    """Score 1 when the answer (or what ``pattern`` captures of it) equals the column's value."""

    kind: Literal["exact_match"]
    column: str = "answer"
    pattern: str | None = None
    ignore_case: bool = True


class RegexSpec(RewardBase):
    """Score 1 when ``pattern`` is found in the answer."""

    kind: Literal["regex"]
    pattern: str


class FormatSpec(RewardBase):
    """Score 1 when the whole answer has the form ``pattern``."""

    kind: Literal["format"]
    pattern: str


class LengthSpec(RewardBase):
    """Score 1 up to ``target`` words, falling linearly to 0 at ``limit`` words."""

    kind: Literal["length"]
    target: Count
    limit: Count


class RepetitionSpec(RewardBase):
    """Score the share of n-grams of the answer that are distinct."""

    kind: Literal["repetition"]
    ngram: Count = 3


class RefusalSpec(RewardBase):
    """Score 1 when the answer declines exactly where the column's value is in ``declines``."""

    kind: Literal["refusal"]
    column: str = "label"
    declines: list[str] = Field(min_length=1)


class MathSpec(RewardBase):
    """Score 1 when the final number (or LaTeX expression) equals the column's value."""

    kind: Literal["math"]
    column: str = "answer"
    latex: bool = False
    timeout_s: Positive = 5.0


class RemoteSpec(RewardBase):
    """Score on a server that ``align serve-reward`` started."""

    kind: Literal["remote"]
    url: str
    """Its address, such as http://127.0.0.1:8765."""
    deadline_s: Positive = 60.0
    """Of one request, retries included."""
    retries: Annotated[int, Field(ge=0)] = 4
    max_failures: Count = 3
    """Requests in a row without an answer after which the stage ends."""
    token_ids: bool = False
    """Send the sampled token ids instead of texts: policy and scorer share a tokenizer."""


class JudgeSpec(RewardBase):
    """Let a language model behind an OpenAI-compatible API grade each answer."""

    kind: Literal["judge"]
    endpoint: EndpointSpec
    criteria: str = "Judge whether it helps: correct, on the question, clear."
    scale: tuple[int, int] = (1, 10)
    """Worst and best grade; the score is the grade's place between them, in [0, 1]."""
    reference: str | None = None
    """Column with a good answer that the judge is shown."""

    @model_validator(mode="after")
    def _scale_rises(self) -> "JudgeSpec":
        if self.scale[0] >= self.scale[1]:
            raise ValueError("scale: the best grade must be above the worst")
        return self


class PythonSpec(RewardBase):
    """Score with a function of one's own: TRL's, verl's or OpenRLHF's convention."""

    kind: Literal["python"]
    path: Annotated[str, Field(pattern=r"^[^:\s][^:]*:[A-Za-z_]\w*$")]
    """``FILE.py:FUNCTION``, from the recipe's folder, or ``MODULE:FUNCTION``; a class will do."""
    args: dict[str, Any] = {}
    """Given to the function by keyword, to a class when it is made."""
    deadline_s: Positive = 30.0
    """Of one call, in seconds; then the process of the function is killed and started again."""
    memory_gib: Positive = 8.0
    """What the process may hold."""

    @property
    def label(self) -> str:
        """The reward's name in tables and metrics: its own, or the function's."""
        return self.name or self.path.rpartition(":")[2]


class EnsembleSpec(RewardBase):
    """Combine rewards that judge the same thing."""

    kind: Literal["ensemble"]
    members: list["RewardSpec"] = Field(min_length=2)
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    kappa: Annotated[float, Field(ge=0.0)] = 1.0


RewardSpec = Annotated[
    ScalarSpec
    | ProcessSpec
    | ExactMatchSpec
    | RegexSpec
    | FormatSpec
    | LengthSpec
    | RepetitionSpec
    | RefusalSpec
    | MathSpec
    | RemoteSpec
    | JudgeSpec
    | PythonSpec
    | EnsembleSpec,
    Field(discriminator="kind"),
]


def kinds() -> dict[str, type[RewardBase]]:
    """Return the class of each kind of reward."""
    classes = get_args(get_args(RewardSpec)[0])
    return {get_args(spec.model_fields["kind"].annotation)[0]: spec for spec in classes}


def read_spec(given: Mapping[str, Any]) -> RewardBase:
    """Return the specification that a plain mapping describes, its defaults filled in.

    Raises:
        ValueError: the kind or a key is unknown, a key is missing, or a value cannot be.
    """
    known, kind = kinds(), given.get("kind")
    if kind not in known:
        raise ValueError(f"reward kind {kind!r} is unknown; use one of {', '.join(known)}")
    try:
        return TypeAdapter(RewardSpec).validate_python(dict(given))
    except ValidationError as error:
        found = [_problem(e, known) for e in error.errors(include_url=False)]
        name = given.get("name") or kind
        raise ValueError(f"reward '{name}': {'; '.join(found)}") from None


def _problem(error: Mapping[str, Any], known: Mapping[str, type[RewardBase]]) -> str:
    # pydantic puts the kind of each reward on the way into the location.
    path = [str(part) for part in error["loc"] if part not in known]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
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
