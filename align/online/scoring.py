"""Score responses: the weighted sum of the rewards, and how invalid scores are handled."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from align.core import distributed
from align.core.errors import DataError
from align.core.types import Completion, PromptRow
from align.models.idle import in_use, models_in
from align.online.advantages import overlong_penalty
from align.recipe.schema import OnlineStage
from align.sampling.rollout import Experience
from reward_models.base import MissingColumnError, RewardFunction, response_to

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores per response, by reward and as their weighted sum; None means invalid."""

    total: list[float | None]
    by_name: dict[str, list[float | None]]


def score_answers(
    prompts: Sequence[PromptRow],
    answers: Sequence[Completion],
    rewards: Sequence[RewardFunction],
    *,
    with_ids: bool = True,
) -> Scores:
    """Return the scores of all rewards and their weighted sum.

    If any reward is invalid (None), the response has no total; it is left out, not counted as 0.

    Args:
        prompts: prompt of each response. answers: responses. rewards: called in order.
        with_ids: True passes token ids to the rewards; False if the responses are text only.

    Raises:
        DataError: a reward needs a column that no prompt has.
    """
    # Columns of the rows become keyword arguments; a row without the column passes None.
    names = sorted({name for p in prompts for name in p.columns})
    columns: dict[str, list[Any]] = {n: [p.columns.get(n) for p in prompts] for n in names}
    if with_ids:
        columns["prompt_ids"] = [list(p.input_ids) for p in prompts]
        columns["completion_ids"] = [list(a.token_ids) for a in answers]
    asked = [p.prompt for p in prompts]
    said = _completions(prompts, [a.text for a in answers])
    whole = _completions(
        prompts, [p.prefill + a.text for p, a in zip(prompts, answers, strict=True)]
    )
    try:
        by_name = {}
        for r in rewards:
            # A reward that is not built from a recipe may not have the attribute.
            completions = whole if getattr(r, "prefill", False) else said
            with in_use(*models_in(r)):
                by_name[r.name] = r(prompts=asked, completions=completions, **columns)
    except MissingColumnError as error:
        raise DataError(str(error)) from error
    total: list[float | None] = []
    for i in range(len(answers)):
        # A missing part would change the scale of the sum, so the whole response becomes invalid.
        parts = [(r.weight, by_name[r.name][i]) for r in rewards]
        known = [w * s for w, s in parts if s is not None]
        value = sum(known) if len(known) == len(parts) else math.nan
        total.append(value if math.isfinite(value) else None)
    return Scores(total, by_name)


def _completions(prompts: Sequence[PromptRow], texts: Sequence[str]) -> list[Any]:
    """Return texts in the convention of the rewards."""
    return [response_to(p.prompt, text) for p, text in zip(prompts, texts, strict=True)]


def disagreement(rewards: Sequence[RewardFunction]) -> dict[str, float]:
    """Return the mean spread among the ensemble members at the last call of the rewards."""
    spreads = [getattr(reward, "disagreement", math.nan) for reward in rewards]
    known = [spread for spread in spreads if math.isfinite(spread)]
    # All ranks take part, also those without an ensemble result.
    sums = distributed.global_sums({"spread": sum(known), "num": float(len(known))})
    return {"reward/disagreement": sums["spread"] / sums["num"]} if sums["num"] else {}


def step_rewards(experience: Experience, rewards: Sequence[RewardFunction]) -> Tensor | None:
    """Return the weighted per-token rewards of process rewards at their last call, (B, T).

    None without a process reward. An estimator without a critic uses only the scores.
    """
    speaking = [
        (r.weight, tokens) for r in rewards if (tokens := getattr(r, "token_rewards", None))
    ]
    if not speaking:
        return None
    # (B, T): 0 on prompts and padding.
    found = torch.zeros(experience.completion.shape)
    for row, mask in enumerate(experience.completion):
        for weight, tokens in speaking:
            # tokens[row] has one number for each completion token of the row.
            found[row, mask] += weight * torch.tensor(tokens[row])
    return found


def apply_scores(
    experience: Experience,
    scores: Scores,
    *,
    truncated_score: float | None,
    mask_truncated: bool,
    penalty: Tensor | None = None,
) -> Experience:
    """Return the experience with scores; responses without one, or masked, are not trained.

    A total that is not finite does not count as a score. A response has no score either if the
    sampler's log-probability of one of its tokens is -inf or NaN.

    Args:
        experience: the responses. scores: their scores.
        truncated_score: score of a response without a stop token; None keeps its own.
        mask_truncated: True leaves such a response out of the loss.
        penalty: (B,) added to the scores, before ``truncated_score``; None adds nothing.
    """
    # (B,) with NaN for invalid responses; the order of the next steps matters.
    total = torch.tensor([math.nan if s is None else s for s in scores.total])
    total = total.masked_fill(~total.isfinite(), math.nan)
    if penalty is not None:
        total = total + penalty
    # Replaces also an invalid score: a truncated response is judged by its truncation alone.
    if truncated_score is not None:
        total = torch.where(experience.truncated, torch.tensor(truncated_score), total)
    impossible = ~experience.per_token["rollout_logprobs"].isfinite().all(1)  # (B,)
    if impossible.any():
        log.warning(
            "%d of %d responses are left out: the sampler gave log-probabilities of tokens that it "
            "sampled as -inf or NaN; try sampling.engine: hf",
            int(impossible.sum()),
            len(impossible),
        )
        total = total.masked_fill(impossible, math.nan)
    # A response keeps its score for the metrics even if it is left out of the loss.
    keep = ~total.isnan()
    if mask_truncated:
        keep &= ~experience.truncated
    return replace(experience, scores=total, mask=experience.mask & keep.unsqueeze(1))


def length_penalty(experience: Experience, spec: OnlineStage) -> Tensor | None:
    """Return the penalty (B,) for responses near the length limit, or None if there is none."""
    if spec.overlong is None:
        return None
    limit = spec.sampling.max_new_tokens
    buffer = spec.overlong.buffer_frac * limit
    lengths = experience.completion.sum(1)
    return spec.overlong.penalty * overlong_penalty(lengths, limit=limit, buffer=buffer)
