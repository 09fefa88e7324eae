"""Query the judge of an evaluate stage, and calibrate a judge against human preferences."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core import distributed
from align.core.artifacts import read_artifact
from align.core.errors import AlignError
from align.core.types import Example
from align.data.load import load_examples
from align.data.split import split_key
from align.evaluation.calibrate import calibration, scored_orders
from align.evaluation.judge import Bench, BothOrders, Pair, answer, judge_model
from align.evaluation.verdict import Judged, Responses
from align.models.loading import num_positions
from align.recipe.schema import DataSpec, EndpointSpec, EvaluateStage, PairwiseSpec
from align.recipe.schema.evaluate import LONGER
from align.stages.base import chat_format
from align.tuning.loading import attach_adapter
from reward_models.base import plain_text
from reward_models.judge import Endpoint, JudgeClient, JudgeError
from reward_models.learned import build_scalar
from reward_models.scalar import reads_first
from reward_models.specs import ScalarSpec

log = logging.getLogger(__name__)


def _open_bench(spec: PairwiseSpec) -> Bench:
    """Connect to the judge of a recipe."""
    plain_spec = spec.endpoint.model_dump()
    cache = plain_spec.pop("cache")
    endpoint = Endpoint(**plain_spec, cache=Path(cache) if cache else None)
    try:
        return Bench(JudgeClient(endpoint), spec.criteria)
    except JudgeError as error:
        raise AlignError(str(error)) from error


def judge_all(
    spec: EvaluateStage, answered: Mapping[str, Responses], *, seed: int
) -> tuple[dict[str, Judged], dict[str, Any]]:
    """Judge each model's responses to a task against the baseline's; rank 0 queries the judge.

    Returns:
        The judged pairs of each model, and the judge's report: verdicts, cost and biases.
    """
    pairwise = spec.pairwise
    assert pairwise is not None

    def judge() -> tuple[dict[str, Judged], dict[str, Any]]:
        baseline = spec.label(spec.baseline)
        # One bench for all models: its cache, its cost and its biases are those of the whole task.
        bench = _open_bench(pairwise)
        judged = {
            name: _judge_one(pairwise, bench, model, other=answered[baseline], seed=seed)
            for name, model in answered.items()
            if name != baseline
        }
        return judged, bench.report()

    # An error of the judge ends every rank with its message.
    return distributed.on_first_rank(judge)


def _judge_one(
    spec: PairwiseSpec, bench: Bench, model: Responses, *, other: Responses, seed: int
) -> Judged:
    try:
        return judge_model(
            bench,
            model.records,
            other.records,
            sequential=spec.sequential,
            batch=spec.batch,
            seed=seed,
        )
    except JudgeError as error:
        raise AlignError(str(error)) from error


def calibrate(
    judge: str, *, model: str | None, data: Sequence[DataSpec], criteria: str, cache: str | None
) -> dict[str, Any]:
    """Return how well a judge agrees with human preferences.

    Args:
        judge: URL of an endpoint, folder of a reward model, or LONGER.
        model: name of the model at the endpoint.
        data: preference pairs; the chosen response is the one that humans preferred.
        criteria: what a judge at an endpoint should consider. cache: folder of its verdicts.
    """
    examples = load_examples(data, kind="preference", seed=0)
    pairs = [
        Pair(plain_text(e.prompt), answer(e.completion or ""), answer(e.rejected or ""))
        for e in examples
    ]
    report: dict[str, Any] = {}
    # Endpoint, length heuristic or reward model.
    if model is not None:
        spec = PairwiseSpec(
            endpoint=EndpointSpec(url=judge, model=model, cache=cache), criteria=criteria
        )
        bench = _open_bench(spec)
        bench.offered = len(pairs)
        try:
            said = bench.judge(pairs)
        except JudgeError as error:
            raise AlignError(str(error)) from error
        report = bench.report()
    elif judge == LONGER:
        said = scored_orders(pairs, lambda _, answers: [float(len(text)) for text in answers])
    else:
        said = _scored(read_artifact(judge, "reward_model").model_dir, examples, pairs)
    found = calibration(pairs, said, clusters=[split_key(e) for e in examples])
    return found | ({"judge": report} if report else {})


def _scored(folder: Path, examples: Sequence[Example], pairs: Sequence[Pair]) -> list[BothOrders]:
    """Return a reward model's verdicts; pairs longer than its context have none."""
    reward = build_scalar(ScalarSpec(kind="scalar", model=str(folder)))
    attach_adapter(reward.model, folder)
    turns = {plain_text(e.prompt): e.prompt for e in examples}

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        said = [[{"role": "assistant", "content": text}] for text in answers]
        return reward(prompts=[turns[p] for p in prompts], completions=said)

    if reads_first(folder):  # returns None itself for pairs that are too long
        return scored_orders(pairs, score)
    chat, limit = chat_format(folder), num_positions(folder) or math.inf
    rows = [chat.pair_row(e) for e in examples]
    fits = [max(len(r.chosen.input_ids), len(r.rejected.input_ids)) <= limit for r in rows]
    # Only pairs that fit are scored; the others keep their place without a verdict.
    said = iter(scored_orders([p for p, fit in zip(pairs, fits, strict=True) if fit], score))
    return [next(said) if fit else BothOrders(None, None) for fit in fits]
