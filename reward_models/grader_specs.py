"""Graders of OpenAI's fine-tuning API as they are written: their types, checks and templates.

Anyone who sends a request supplies the grader. Its templates are looked up and never evaluated.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from reward_models.field_errors import field_error
from reward_models.formula import Formula, FormulaError
from reward_models.similarity import METRICS

SLOT = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
PATH = re.compile(r"\s*(item|sample)((?:\.[A-Za-z_][\w-]*|\[\d{1,9}\])*)\s*")
STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d+)\]")
FLAGS = (
    *("formula_parse_error", "invalid_variable_error", "sample_parse_error"),
    *("truncated_observation_error", "unresponsive_reward_error", "other_error"),
    *("python_grader_runtime_error", "python_grader_server_error"),
    *("model_grader_parse_error", "model_grader_refusal_error", "model_grader_server_error"),
)
"""Kinds of errors of a run; some have details under a further name."""


class GraderError(ValueError):
    """A grader that is not valid."""


class RunError(ValueError):
    """A grader that has no score for a response.

    Args:
        kind: one of ``FLAGS``.
        message: why.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=64)]


class StringCheck(_Spec):
    """Score 1 if two texts are equal, or one contains the other."""

    type: Literal["string_check"]
    input: str
    reference: str
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(_Spec):
    """Score the similarity of two texts."""

    type: Literal["text_similarity"]
    input: str
    reference: str
    evaluation_metric: Literal[("cosine", *METRICS)]  # type: ignore[valid-type]

    @field_validator("evaluation_metric")
    @classmethod
    def _can_be_computed(cls, metric: str) -> str:
        # A cosine of something else, such as of word counts, would be another score.
        if metric == "cosine":
            raise ValueError(
                "cosine compares embeddings by a model of OpenAI, which is not here; use one of "
                + ", ".join(METRICS)
            )
        return metric


class PythonGrader(_Spec):
    """Score by a function ``grade(sample, item)``."""

    type: Literal["python"]
    source: Annotated[str, Field(max_length=256_000)]
    image_tag: str | None = None


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["input_text", "output_text", "text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["user", "assistant", "system", "developer"]
    content: str | _Part | list[str | _Part]
    type: Literal["message"] = "message"

    def text(self) -> str:
        parts = self.content if isinstance(self.content, list) else [self.content]
        return "".join(part if isinstance(part, str) else part.text for part in parts)


class _Sampling(BaseModel):
    model_config = ConfigDict(extra="forbid")
    max_completions_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning_effort: None = None
    """Models of a server have no such setting; a value would have no effect."""
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None


class ScoreModel(_Spec):
    """Score by the number that a model replies."""

    type: Literal["score_model"]
    model: str
    input: Annotated[list[_Message], Field(min_length=1)]
    range: tuple[float, float] = (0.0, 1.0)
    sampling_params: _Sampling = _Sampling()


class LabelModel(_Spec):
    """Score 1 if a model replies with a passing label."""

    type: Literal["label_model"]
    model: str
    input: Annotated[list[_Message], Field(min_length=1)]
    labels: Annotated[list[str], Field(min_length=1)]
    passing_labels: list[str]
    sampling_params: _Sampling = _Sampling()


Single = Annotated[
    StringCheck | TextSimilarity | PythonGrader | ScoreModel | LabelModel,
    Field(discriminator="type"),
]


_Graders = dict[str, Single] | list[Single] | Single


class Multi(_Spec):
    """Score by a formula of other graders' scores."""

    type: Literal["multi"]
    graders: _Graders
    calculate_output: str

    @field_validator("graders")
    @classmethod
    def _have_names(cls, graders: _Graders) -> _Graders:
        if not graders:
            raise ValueError("expected at least one grader")
        names = [grader.name for grader in graders] if isinstance(graders, list) else []
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two graders are named {twice[0]!r}; the formula needs different names"
            )
        return graders

    def members(self) -> dict[str, Single]:
        """Return the graders by the names that the formula uses."""
        if isinstance(self.graders, dict):
            return self.graders
        listed = self.graders if isinstance(self.graders, list) else [self.graders]
        return {grader.name: grader for grader in listed}


Grader = Annotated[
    StringCheck | TextSimilarity | PythonGrader | ScoreModel | LabelModel | Multi,
    Field(discriminator="type"),
]
_ADAPTER: TypeAdapter[Any] = TypeAdapter(Grader)


def read_grader(given: object) -> Any:
    """Return the grader that plain data describes.

    Raises:
        GraderError: it is not valid, or its type is for members of a multi grader only.
    """
    try:
        grader = _ADAPTER.validate_python(given)
    except ValidationError as error:
        found, told = field_error(error.errors(include_url=False), given)
        place = ".".join(map(str, found))
        raise GraderError(f"{place or 'grader'}: {told}") from None
    if isinstance(grader, LabelModel):
        raise GraderError("label_model: expected inside of a multi grader only")
    for member in grader.members().values() if isinstance(grader, Multi) else [grader]:
        _check(member)
    if isinstance(grader, Multi):
        _check_formula(grader)
    return grader


def _check(grader: Grader) -> None:
    """Raise if templates, program, range or labels of a grader are wrong."""
    try:
        for text in _templates(grader):
            for slot in SLOT.findall(text):
                _steps(slot)
    except RunError as error:
        raise GraderError(f"{grader.name}: {error}") from None
    if isinstance(grader, PythonGrader):
        _check_source(grader)
    if isinstance(grader, ScoreModel):
        low, high = grader.range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise GraderError(f"{grader.name}: range must be two numbers, the lower one first")
    if isinstance(grader, LabelModel) and (
        wrong := set(grader.passing_labels) - set(grader.labels)
    ):
        raise GraderError(f"{grader.name}: passing_labels: {min(wrong)!r} is none of the labels")


def _check_source(grader: PythonGrader) -> None:
    try:
        compile(grader.source, "grader.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GraderError(f"{grader.name}: source: {error}") from None
    if not re.search(r"^def grade\(", grader.source, re.MULTILINE):
        raise GraderError(f"{grader.name}: source has no function 'def grade(sample, item)'")


def _check_formula(grader: Multi) -> None:
    try:
        missing = Formula(grader.calculate_output).names - grader.members().keys()
    except FormulaError as error:
        raise GraderError(f"calculate_output: {error}") from None
    if missing:
        raise GraderError(f"calculate_output: there is no grader named {min(missing)!r}")


def _templates(grader: Grader) -> list[str]:
    if isinstance(grader, StringCheck | TextSimilarity):
        return [grader.input, grader.reference]
    if isinstance(grader, ScoreModel | LabelModel):
        return [message.text() for message in grader.input]
    return []


# ---- templates


def _steps(slot: str) -> tuple[str, list[str | int]]:
    """Return the namespace of a slot and the keys below it."""
    found = PATH.fullmatch(slot)
    if found is None:
        raise RunError(
            "invalid_variable_error",
            f"{{{{{slot[:80]}}}}}: expected {{{{ item.KEY }}}} or {{{{ sample.KEY }}}}",
        )
    steps = [name or int(index) for name, index in STEP.findall(found[2])]
    return found[1], steps


def fill(text: str, spaces: Mapping[str, Any]) -> str:
    """Return a template with its slots filled once; what is filled in is not read again.

    Raises:
        RunError: a slot names nothing.
    """

    def value(match: re.Match[str]) -> str:
        space, steps = _steps(match[1])
        found = spaces[space]
        for step in steps:
            try:
                fits = isinstance(found, dict if isinstance(step, str) else list)
                found = found[step] if fits else {}[step]
            except (LookupError, TypeError):
                parse = step == "output_json" and space == "sample"
                kind = "sample_parse_error" if parse else "invalid_variable_error"
                why = "the response is not JSON" if parse else f"there is no {step!r}"
                raise RunError(kind, f"{{{{{match[1][:80]}}}}}: {why}") from None
        # Text is filled in as it is, any other value as JSON.
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return SLOT.sub(value, text)


def sample_of(text: str) -> dict[str, Any]:
    """Return the namespace ``sample`` of a response."""
    message = {"role": "assistant", "content": text}
    sample = {
        "output_text": text,
        "output_tools": [],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    with suppress(ValueError, RecursionError):  # it is not JSON
        sample["output_json"] = json.loads(text)
    return sample
