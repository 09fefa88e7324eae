"""Graders before a job: is one valid, and what does it say about a response?"""

import threading
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.asked import Asked
from align.serve.finetuning.common import Api
from reward_models.grader_specs import FLAGS, Grader, GraderError, Multi, read_grader
from reward_models.graders import DETAILS, Outcome, request_of, run_grader

MAX_RUNS = 16
"""Graders that run at the same time; each may take seconds of a core."""


class ValidateRequest(Asked):
    """A grader to check."""

    grader: dict[str, Any]


class RunRequest(Asked):
    """A grader, a response and the row that it answers."""

    grader: dict[str, Any]
    model_sample: str
    item: Any = None


def add_graders(routes: APIRouter, api: Api) -> None:
    """Add the routes below /v1/fine_tuning/alpha/graders."""
    me, room = api.me, threading.BoundedSemaphore(MAX_RUNS)

    @routes.post("/fine_tuning/alpha/graders/validate")
    def validate(asked: ValidateRequest, person: Annotated[Person, me]) -> dict[str, Any]:
        _read(asked.grader)
        return {"grader": asked.grader}

    @routes.post("/fine_tuning/alpha/graders/run")
    def run(asked: RunRequest, person: Annotated[Person, me]) -> dict[str, Any]:
        grader = _read(asked.grader)
        tokens: dict[str, int] = {}

        def ask(model: str, messages: list[dict[str, str]], sampling: Mapping[str, Any]) -> str:
            answer = api.generators.complete(person, request_of(model, messages, sampling))
            tokens[model] = tokens.get(model, 0) + answer["usage"]["total_tokens"]
            return answer["choices"][0]["message"]["content"]

        if not room.acquire(blocking=False):
            raise ServeError(
                429,
                f"{MAX_RUNS} graders are running. Try again.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        try:
            outcome = run_grader(grader, asked.model_sample, asked.item, ask=ask)
        finally:
            room.release()
        return _answer(grader, outcome, tokens)


def _read(given: dict[str, Any]) -> Any:
    try:
        return read_grader(given)
    except GraderError as error:
        raise ServeError(400, str(error), code="invalid_grader", param="grader") from error


def _answer(grader: Grader, outcome: Outcome, tokens: dict[str, int]) -> dict[str, Any]:
    errors: dict[str, Any] = {flag: flag in outcome.errors for flag in FLAGS}
    errors |= {name: outcome.errors.get(flag) for flag, name in DETAILS.items()}
    scores = outcome.sub_rewards if isinstance(grader, Multi) else {grader.name: outcome.reward}
    return {
        # The type has no room for a missing reward; the errors tell a 0 from a score.
        "reward": 0.0 if outcome.reward is None else outcome.reward,
        "sub_rewards": outcome.sub_rewards,
        "model_grader_token_usage_per_model": tokens,
        "metadata": {
            "name": grader.name,
            "type": grader.type,
            "scores": scores,
            "errors": errors,
            "execution_time": outcome.seconds,
            "sampled_model_name": None,
            "token_usage": sum(tokens.values()) or None,
        },
    }
