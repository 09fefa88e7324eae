"""Measure sampled responses: scores, KL to the reference policy, perplexity, repetition."""

import hashlib
import json
from collections.abc import Sequence

from torch import Tensor, nn

from align.core.types import TokenRow
from align.data.fit import fit_rows
from align.data.load import load_examples
from align.data.render.chat import ChatFormat
from align.evaluation.compare import Record
from align.evaluation.verdict import RowLoss
from align.models.logprobs import LogprobModel
from align.online.annotate import infer_tokens, plan_by_prompt
from align.online.guard import repeated_share
from align.online.scoring import score_answers
from align.recipe.schema import EvaluateStage, TaskSpec
from align.sampling.rollout import Experience
from align.stages.base import StageContext
from align.training.batch import PackedBatch, pack
from align.training.heldout import prompt_of
from align.training.infer import map_rows
from align.tuning.loading import load_tuned_policy
from reward_models.base import RewardFunction

TaskRewards = dict[str, tuple[list[RewardFunction], list[RewardFunction]]]
"""{task: (rewards of the grader, rewards of the judge)}."""
MICRO_TOKENS = 16384
"""Tokens of one forward pass."""


def wants_kl(task: TaskSpec) -> bool:
    """Return whether KL is reported and can be estimated.

    The estimate is unbiased only for responses sampled from the policy itself: temperature 1, and
    no truncation by ``top_p``.
    """
    sampling = task.sampling
    return sampling.temperature == 1.0 and sampling.top_p == 1.0 and "kl" in task.reported


def load_reference(spec: EvaluateStage, context: StageContext) -> LogprobModel:
    """Load the reference policy of the KL estimate."""
    artifact = context.artifact(spec.reference or spec.baseline, "policy", with_adapter=True)
    return LogprobModel(load_tuned_policy(artifact.model_dir, dtype=spec.dtype)).eval()


def kl_per_answer(
    answers: Experience, *, policy: LogprobModel, reference: LogprobModel
) -> list[float]:
    """Return KL(policy || reference) of each response in nats: log-ratio summed over its tokens."""
    policy.eval()

    def log_ratio(model: nn.Module, batch: PackedBatch) -> Tensor:
        own, other = (
            m(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs
            for m in (model, reference)
        )
        return own - other  # (1, N)

    # log p - log q at tokens sampled from p: an unbiased estimate of KL(p || q) per response.
    plan = plan_by_prompt(answers, range(len(answers.lengths)), MICRO_TOKENS)
    return infer_tokens(answers, policy, plan=plan, fn=log_ratio).sum(1).tolist()


def held_out_rows(task: TaskSpec, chat: ChatFormat, context: StageContext) -> list[TokenRow]:
    """Return the tokenized held-out responses for a task's perplexity."""
    if not task.answers:
        return []
    examples = load_examples(task.answers, kind="sft", seed=context.seed)
    return fit_rows(
        [chat.sft_row(e) for e in examples],
        max_length=task.max_length,
        max_lost_frac=task.max_lost_frac,
        what=f"{context.name}: responses of task {task.name}",
        ledger=context.ledger,
    )[0]


def row_losses(policy: LogprobModel, rows: Sequence[TokenRow]) -> list[RowLoss]:
    """Return the negative log-likelihood of each row's trained tokens, split across ranks."""
    if not rows:
        return []

    def nats(model: nn.Module, batch: PackedBatch) -> list[float]:
        logprobs = model(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs  # (1, N)
        return batch.segment_sums(-logprobs.double() * batch.mask).tolist()

    found = map_rows(
        policy,
        rows,
        nats,
        length=lambda row: len(row.input_ids),
        collate=pack,
        micro_tokens=MICRO_TOKENS,
    )
    return [
        RowLoss(value, sum(row.trained), prompt_of(row))
        for row, value in zip(rows, found, strict=True)
    ]


def to_records(
    answers: Experience,
    kl: Sequence[float | None],
    *,
    scores: Sequence[RewardFunction],
    judge: Sequence[RewardFunction],
    by: str | None = None,
) -> list[Record]:
    """Return one record per response with all its measurements.

    Args:
        answers: responses of this rank. kl: nats of each response, None if not measured.
        scores: reported rewards. judge: rewards whose weighted sum decides comparisons.
        by: column that the records are grouped by.
    """
    columns = score_answers(answers.prompts, answers.completions, scores).by_name
    verdicts: list[float | None] = [None] * len(answers.completions)
    if judge:
        verdicts = score_answers(answers.prompts, answers.completions, judge).total
    # Responses of one prompt are numbered in the order in which they were sampled.
    groups = answers.group_ids.tolist()
    seen: dict[int, int] = {}
    records: list[Record] = []
    for i, (prompt, answer) in enumerate(zip(answers.prompts, answers.completions, strict=True)):
        sample = seen[groups[i]] = seen.get(groups[i], -1) + 1
        records.append(
            {
                "prompt_index": groups[i],
                "sample_index": sample,
                "prompt": prompt.prompt,
                "completion": answer.text,
                "scores": {name: values[i] for name, values in columns.items()},
                "judge": verdicts[i],
                "length": len(answer.token_ids),
                "repeats": repeated_share(answer.text),
                "kl": kl[i],
                "finish_reason": answer.finish_reason,
                "cluster": same_text(prompt.prompt),
                "group": None if by is None else str(prompt.columns.get(by)),
            }
        )
    return records


def same_text(prompt: object) -> str:
    """Return a short hash that equal prompts share, on all ranks."""
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
