"""Query the judge of an evaluate stage, and calibrate a judge against human preferences."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align.core import distributed
from align.core.artifacts import read_artifact
from align.core.errors import AlignError
from align.core.types import Example, PromptRow, Text
from align.data.load import load_examples
from align.data.split import split_key
from align.evaluation.calibrate import calibration, scored_orders
from align.evaluation.judge import (
    Bench,
    BothOrders,
    EndpointJudge,
    FunctionJudge,
    Pair,
    PairJudge,
    answer,
    judge_model,
)
from align.evaluation.verdict import Judged, Responses
from align.models.loading import num_positions
from align.recipe.schema import DataSpec, EndpointSpec, EvaluateStage, PairwiseSpec
from align.recipe.schema.evaluate import LONGER
from align.stages.base import chat_format
from align.tuning.loading import attach_adapter
from reward_models import build_reward
from reward_models.base import MissingColumnError, RewardFunction
from reward_models.judge import Endpoint, JudgeClient, JudgeError
from reward_models.learned import build_scalar
from reward_models.scalar import reads_first
from reward_models.specs import FUNCTION, ScalarSpec

log = logging.getLogger(__name__)


def _endpoint_judge(spec: EndpointSpec, criteria: str) -> EndpointJudge:
    """Connect to the judge of a recipe."""
    plain_spec = spec.model_dump()
    cache = plain_spec.pop("cache")
    endpoint = Endpoint(**plain_spec, cache=Path(cache) if cache else None)
    try:
        return EndpointJudge(JudgeClient(endpoint), criteria)
    except JudgeError as error:
        raise AlignError(str(error)) from error


def judge_all(
    spec: EvaluateStage,
    answered: Mapping[str, Responses],
    *,
    function: RewardFunction | None,
    rows: Sequence[PromptRow],
    seed: int,
) -> tuple[dict[str, Judged], dict[str, Any]]:
    """Judge each model's responses to a task against the baseline's; rank 0 queries the judge.

    Args:
        spec: the stage. answered: responses of its models to a task.
        function: the judge if it is a function.
        rows: the prompts of the task. seed: random seed of the order of the prompts.

    Returns:
        The judged pairs of each model, and the judge's report: verdicts, cost and biases.
    """
    pairwise = spec.pairwise
    assert pairwise is not None

    def judge() -> tuple[dict[str, Judged], dict[str, Any]]:
        baseline = spec.label(spec.baseline)
        # One bench for all models: its cache, its cost and its biases are those of the whole task.
        bench = Bench(_judge_of(pairwise, function))
        judge_one = partial(
            judge_model,
            bench,
            others=answered[baseline].records,
            sequential=pairwise.sequential,
            batch=pairwise.batch,
            seed=seed,
            columns=[row.columns for row in rows],
        )
        try:
            judged = {
                name: judge_one(records=model.records)
                for name, model in answered.items()
                if name != baseline
            }
        except (JudgeError, MissingColumnError) as error:
            raise AlignError(str(error)) from error
        return judged, bench.report()

    # An error of the judge ends every rank with its message.
    return distributed.on_first_rank(judge)


def _judge_of(spec: PairwiseSpec, function: RewardFunction | None) -> PairJudge:
    if function is not None:
        return FunctionJudge(function)
    assert spec.endpoint is not None
    return _endpoint_judge(spec.endpoint, spec.criteria)


def calibrate(
    judge: str, *, model: str | None, data: Sequence[DataSpec], criteria: str, cache: str | None
) -> dict[str, Any]:
    """Return how well a judge agrees with human preferences.

    Args:
        judge: URL of an endpoint, folder of a reward model, ``FILE.py:NAME``, or LONGER.
        model: name of the model at the endpoint.
        data: preference pairs; the chosen response is the one that humans preferred.
        criteria: what a judge at an endpoint should consider. cache: folder of its verdicts.
    """
    examples = load_examples(data, kind="preference", seed=0)
    pairs = [
        Pair(e.prompt, answer(e.completion or ""), answer(e.rejected or ""), e.columns)
        for e in examples
    ]
    report: dict[str, Any] = {}
    by: PairJudge | None = None
    # Endpoint, function, length heuristic or reward model.
    if model is not None:
        by = _endpoint_judge(EndpointSpec(url=judge, model=model, cache=cache), criteria)
    elif re.fullmatch(FUNCTION, judge):
        by = FunctionJudge(_own_judge(judge))
    if by is not None:
        bench = Bench(by, offered=len(pairs))
        try:
            said = bench.judge(pairs)
        except (JudgeError, MissingColumnError) as error:
            raise AlignError(str(error)) from error
        report = bench.report()
    elif judge == LONGER:
        said = scored_orders(pairs, lambda _, answers: [float(len(text)) for text in answers])
    else:
        said = _scored(read_artifact(judge, "reward_model").model_dir, examples, pairs)
    found = calibration(pairs, said, clusters=[split_key(e) for e in examples])
    return found | ({"judge": report} if report else {})


def _own_judge(path: str) -> RewardFunction:
    try:
        return build_reward({"kind": "python", "path": path})
    except ValueError as error:
        raise AlignError(str(error)) from error


def _scored(folder: Path, examples: Sequence[Example], pairs: Sequence[Pair]) -> list[BothOrders]:
    """Return a reward model's verdicts; pairs longer than its context have none."""
    reward = build_scalar(ScalarSpec(kind="scalar", model=str(folder)))
    attach_adapter(reward.model, folder)

    def score(prompts: Sequence[Text], answers: Sequence[str]) -> list[float | None]:
        said = [[{"role": "assistant", "content": text}] for text in answers]
        return reward(prompts=prompts, completions=said)

    if reads_first(folder):  # returns None itself for pairs that are too long
        return scored_orders(pairs, score)
    chat, limit = chat_format(folder), num_positions(folder) or math.inf
    rows = [chat.pair_row(e) for e in examples]
    fits = [max(len(r.chosen.input_ids), len(r.rejected.input_ids)) <= limit for r in rows]
    # Only pairs that fit are scored; the others keep their place without a verdict.
    said = iter(scored_orders([p for p, fit in zip(pairs, fits, strict=True) if fit], score))
    return [next(said) if fit else BothOrders(None, None) for fit in fits]
