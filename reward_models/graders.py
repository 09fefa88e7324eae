"""Graders of OpenAI's fine-tuning API: checks, similarities, judges, programs and formulas of them.

Anyone who sends a request supplies the grader. Its templates are looked up and never evaluated, its
programs run in the sandbox, its formulas are arithmetic.
"""

import json
import math
import os
import re
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_models.formula import Formula, FormulaError
from reward_models.grader_specs import (
    Grader,
    LabelModel,
    Multi,
    PythonGrader,
    RunError,
    ScoreModel,
    Single,
    StringCheck,
    TextSimilarity,
    fill,
    read_grader,
    sample_of,
)
from reward_models.sandbox import Limits, SandboxError, run_program
from reward_models.similarity import similarity

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
LIMITS = Limits(timeout_s=10.0, memory_gib=1.0)
MAX_TEXT = 100_000
"""Characters of a text that is compared."""
REQUEST_S = 300.0
KEY_VARIABLE = "ALIGN_GRADER_KEY"
HARNESS = """
def _told():
    import json, sys
    told = json.loads(sys.stdin.read())
    try:
        score = grade(told["sample"], told["item"])
        found = {"score": float(score)}
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write("\\n" + json.dumps(found) + "\\n")
_told()
"""
DETAILS = {
    "python_grader_runtime_error": "python_grader_runtime_error_details",
    "python_grader_server_error": "python_grader_server_error_type",
    "model_grader_server_error": "model_grader_server_error_details",
}
Ask = Callable[[str, list[dict[str, str]], Mapping[str, Any]], str]
"""Return a model's reply, given its name, messages and sampling parameters."""


# ---- scores


@dataclass
class Outcome:
    """Scores of a response, or why there are none.

    Attributes:
        reward: the score; None if there is none.
        sub_rewards: of the members of a multi grader.
        errors: kinds of errors and what they say.
        seconds: that it took.
    """

    reward: float | None = None
    sub_rewards: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def run_grader(grader: Grader, text: str, item: object, *, ask: Ask) -> Outcome:
    """Return the outcome of one response."""
    return run_graders(grader, [text], [item], ask=ask)[0]


def run_graders(
    grader: Grader, texts: Sequence[str], items: Sequence[Any], *, ask: Ask
) -> list[Outcome]:
    """Return the outcomes of responses; a program is started once for all of them.

    Args:
        grader: from ``read_grader``.
        texts: the responses.
        items: of each, what the templates call ``item``.
        ask: asks a model.
    """
    began = time.monotonic()
    members: dict[str, Single] = (
        grader.members() if isinstance(grader, Multi) else {grader.name: grader}
    )
    spaces = [
        {"sample": sample_of(text), "item": item} for text, item in zip(texts, items, strict=True)
    ]
    outcomes = [Outcome() for _ in texts]
    for name, member in members.items():
        for outcome, score in zip(outcomes, _scores(member, spaces, ask), strict=True):
            if isinstance(score, RunError):
                outcome.errors[score.kind] = str(score)
            else:
                outcome.sub_rewards[name] = score
    for outcome in outcomes:
        outcome.seconds = time.monotonic() - began
        if outcome.errors:
            continue
        if not isinstance(grader, Multi):
            # The score of a single grader is the reward itself, not a part of it.
            outcome.reward = outcome.sub_rewards.pop(grader.name)
            continue
        try:
            outcome.reward = Formula(grader.calculate_output)(outcome.sub_rewards)
        except FormulaError as error:
            outcome.errors["formula_parse_error"] = str(error)
    return outcomes


def _scores(
    grader: Single, spaces: Sequence[Mapping[str, Any]], ask: Ask
) -> Sequence[float | RunError]:
    if isinstance(grader, PythonGrader):
        return _run_source(grader, spaces)
    found: list[float | RunError] = []
    for space in spaces:
        try:
            found.append(_score(grader, space, ask))
        except RunError as error:
            found.append(error)
    return found


def _score(
    grader: StringCheck | TextSimilarity | ScoreModel | LabelModel,
    space: Mapping[str, Any],
    ask: Ask,
) -> float:
    if isinstance(grader, ScoreModel | LabelModel):
        return _asked(grader, space, ask)
    text, reference = fill(grader.input, space), fill(grader.reference, space)
    if max(len(text), len(reference)) > MAX_TEXT:
        raise RunError("truncated_observation_error", f"longer than {MAX_TEXT} characters")
    if isinstance(grader, TextSimilarity):
        return similarity(grader.evaluation_metric, text, reference)
    holds = {
        "eq": text == reference,
        "ne": text != reference,
        "like": reference in text,
        "ilike": reference.lower() in text.lower(),
    }
    return float(holds[grader.operation])


def _run_source(
    grader: PythonGrader, spaces: Sequence[Mapping[str, Any]]
) -> list[float | RunError]:
    """Run a program on each response in the sandbox."""
    told = [json.dumps({"sample": s["sample"], "item": s["item"]}) for s in spaces]
    try:
        ended = run_program(grader.source + HARNESS, told, LIMITS)
    except (SandboxError, OSError) as error:
        return [RunError("python_grader_server_error", str(error))] * len(spaces)
    found: list[float | RunError] = []
    for _, output in ended:
        lines = output.strip().splitlines()
        try:
            # The program may print as well: the harness writes the result last.
            last = json.loads(lines[-1])
            score = last.get("score")
        except (ValueError, LookupError, AttributeError, RecursionError):
            last, score = {}, None
        if isinstance(score, float) and math.isfinite(score):
            found.append(score)
        else:
            why = str(last.get("error") or f"no number: {score}")
            found.append(RunError("python_grader_runtime_error", why))
    why = f"no end within {LIMITS.timeout_s:.0f} s, or more than {LIMITS.memory_gib:.0f} GiB"
    missing = len(spaces) - len(found)
    # A program that ended early has no line for the responses that it did not reach.
    return found + [RunError("python_grader_runtime_error", why)] * missing


def _asked(grader: ScoreModel | LabelModel, space: Mapping[str, Any], ask: Ask) -> float:
    """Return the score that a model gives."""
    messages = [{"role": m.role, "content": fill(m.text(), space)} for m in grader.input]
    if isinstance(grader, ScoreModel):
        low, high = grader.range
        order = f"Reply with one number from {low:g} to {high:g} and nothing else."
    else:
        order = "Reply with one of these labels and nothing else: " + ", ".join(grader.labels)
    messages[-1]["content"] += f"\n\n{order}"
    chosen = grader.sampling_params.model_dump(exclude_none=True)
    try:
        reply = ask(grader.model, messages, chosen).strip()
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise RunError("model_grader_server_error", str(error)) from error
    if isinstance(grader, LabelModel):
        label = next((x for x in grader.labels if reply.strip(" .\"'").lower() == x.lower()), None)
        if label is None:
            raise RunError("model_grader_parse_error", f"{reply[:80]!r} is none of the labels")
        return float(label in grader.passing_labels)
    number = NUMBER.search(reply)
    if number is None or not low <= float(number[0]) <= high:
        raise RunError("model_grader_parse_error", f"{reply[:80]!r} is not a number in the range")
    return float(number[0])


# ---- as a reward


class GraderReward:
    """A grader as the reward of an online stage, for ``kind: python``.

    Args:
        grader: as JSON.
        url: base of the API that model graders ask; the key is in ALIGN_GRADER_KEY.
        heldout: True for held-out prompts, which changes nothing.
    """

    def __init__(self, grader: str, url: str, *, heldout: bool = False) -> None:
        self._grader = read_grader(json.loads(grader))
        self._url = url
        del heldout

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        item: Sequence[str],
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """Return one score per response, None where the grader has none."""
        del prompts, columns
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        items = [json.loads(text) for text in item]
        return [o.reward for o in run_graders(self._grader, texts, items, ask=self._ask)]

    def _ask(self, model: str, messages: list[dict[str, str]], sampling: Mapping[str, Any]) -> str:
        return ask_url(self._url, request_of(model, messages, sampling))


def request_of(
    model: str, messages: list[dict[str, str]], sampling: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the body of a request for a model grader's reply."""
    chosen = {k: sampling[k] for k in ("seed", "temperature", "top_p") if k in sampling}
    length = sampling.get("max_completions_tokens", 256)
    return {"model": model, "messages": messages, "max_completion_tokens": length, **chosen}


def ask_url(url: str, body: Mapping[str, Any]) -> str:
    """Return a model's reply from an API.

    Raises:
        OSError: there is no answer, or an error.
        LookupError: the answer has no reply.
    """
    request = urllib.request.Request(
        f"{url}/chat/completions",
        json.dumps(body).encode(),
        {
            "content-type": "application/json",
            "authorization": f"Bearer {os.environ.get(KEY_VARIABLE, '')}",
        },
    )
    # The server is on this machine: no proxy of the environment is in between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=REQUEST_S) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])
