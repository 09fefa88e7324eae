"""The wrong field of a request is named as it is in the request, whatever types it may have."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from align.serve.finetuning.asked import JobRequest
from align.serve.finetuning.chat import ChatRequest
from reward_models.field_errors import field_error
from reward_models.grader_specs import GraderError, read_grader


class One(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["one"]
    deep: list[int | Literal["auto"]] = []


class Two(BaseModel):
    type: Literal["two"]
    inner: One


Either = Annotated[One | Two, Field(discriminator="type")]


@pytest.mark.parametrize(
    ("given", "place", "told"),
    [
        ({"type": "one", "deep": [1, None]}, "deep.1", "valid integer, or: Input should be 'auto'"),
        ({"type": "one", "one": 1}, "one", "Extra inputs"),
        ({"type": "two"}, "inner", "Field required"),
        ({"type": "two", "inner": {"type": "one", "deep": {}}}, "inner.deep", "valid list"),
        ({"type": "three"}, "type", "Input should be one of 'one', 'two'"),
        ({}, "type", "Field required"),
        ([], "", "dictionary"),
    ],
)
def test_names_of_types_are_no_part_of_a_place(given: Any, place: str, told: str):
    adapter: TypeAdapter[Any] = TypeAdapter(Either)
    with pytest.raises(ValidationError) as error:
        adapter.validate_python(given)
    found, message = field_error(error.value.errors(), given)
    assert ".".join(map(str, found)) == place
    assert told in message


JOB = {"model": "m", "training_file": "f"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("kind", "change", "place", "told"),
    [
        (JobRequest, {"seed": "x"}, "seed", "valid integer"),
        (
            JobRequest,
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": None}}}},
            "method.dpo.hyperparameters.n_epochs",
            "'auto'",
        ),
        (ChatRequest, {"stop": ["a"] * 5}, "stop", "at most 4 items"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": None}]},
            "messages.0.content",
            "valid string, or: Input should be a valid list",
        ),
    ],
)
def test_requests_of_the_api_name_the_clients_own_keys(
    kind: type[BaseModel], change: dict[str, Any], place: str, told: str
):
    given = {**(JOB if kind is JobRequest else CHAT), **change}
    with pytest.raises(ValidationError) as error:
        kind.model_validate(given)
    found, message = field_error(error.value.errors(), given)
    assert ".".join(map(str, found)) == place
    assert told in message
    assert "constrained" not in message


CHECK = {"type": "string_check", "name": "a", "input": "x", "reference": "x", "operation": "eq"}
MULTI = {"type": "multi", "name": "m", "calculate_output": "a"}
ASKED = {"type": "score_model", "name": "a", "model": "m", "input": [{"role": "user"}]}


@pytest.mark.parametrize(
    ("grader", "told"),
    [
        ({**MULTI, "graders": {"a": {**CHECK, "type": "multi"}}}, "graders.a.type: Input should"),
        ({**MULTI, "graders": {"a": {**CHECK, "operation": 1}}}, "graders.a.operation: Input"),
        ({**MULTI, "graders": {}, "calculate_output": "1"}, "graders: expected at least one"),
        ({**MULTI, "graders": [CHECK, CHECK]}, "graders: two graders are named 'a'"),
        ({"name": "a"}, "type: Field required"),
        (ASKED, "input.0.content: Field required"),
        (
            {**ASKED, "input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type: Input should be",
        ),
        (
            {
                **ASKED,
                "input": [{"role": "user", "content": "x"}],
                "sampling_params": {"reasoning_effort": "low"},
            },
            "sampling_params.reasoning_effort",
        ),
    ],
)
def test_a_grader_that_is_not_valid_names_its_own_keys(grader: dict[str, Any], told: str):
    with pytest.raises(GraderError) as error:
        read_grader(grader)
    assert str(error.value).startswith(told)
