"""Measure a reward model's mean and std on reference responses, from the data or sampled."""

import logging
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from align.core import distributed
from align.core.types import PromptRow, TokenRow
from align.data.fit import fit_rows
from align.data.load import load_examples
from align.data.render.chat import ChatFormat
from align.preflight.checks import spread
from align.recipe.schema import RewardStage
from align.sampling.build import build_engine
from align.sampling.rollout import sample_groups
from align.stages.base import StageContext
from align.stages.rollouts import engine_options

log = logging.getLogger(__name__)
Numbers = list[float] | float


def normalization(scores: Tensor) -> tuple[Numbers, Numbers]:
    """Return mean and population std of the scores of reference responses (arXiv:1909.08593).

    Args:
        scores: (num, heads).

    Returns:
        One number each, or one per head if there are several.
    """
    found = scores.double()
    mean, std = found.mean(0), found.std(0, correction=0)  # (heads,)
    # If all scores agree, their spread is rounding error: do not divide by it.
    std = torch.where(std <= 1e-6 * mean.abs().clamp(min=1.0), torch.ones_like(std), std)
    log.info(
        "scores of %d reference responses: mean %s, std %s",
        len(found),
        mean.tolist(),
        std.tolist(),
    )
    return (mean.item(), std.item()) if mean.numel() == 1 else (mean.tolist(), std.tolist())


def sampled_rows(
    spec: RewardStage, context: StageContext, *, model_dir: Path, chat: ChatFormat
) -> list[TokenRow]:
    """Return responses to prompts of the data, sampled from the policy of ``spec.init``."""
    sampling = spec.norm_sampling
    assert sampling is not None
    prompts = _distinct_prompts(spec, context, chat)
    options = engine_options(spec, sampling, model_dir, chat=chat, seed=context.seed)
    engine = build_engine(sampling.engine, options)
    with closing(engine), engine.awake():
        groups = sample_groups(
            engine,
            prompts,
            n=1,
            step=0,
            seed=distributed.derive_seed(context.seed, "norm"),
            sampling=sampling,
            stop_token_ids=chat.stop_token_ids,
        )
    rows = []
    # Nothing is trained on them, so no token is marked as trained.
    for prompt, (answer,) in zip(prompts, groups, strict=True):
        ids = (*prompt.input_ids, *answer.token_ids)
        rows.append(TokenRow(ids, (False,) * len(ids), prompt.source))
    return rows


def _distinct_prompts(
    spec: RewardStage, context: StageContext, chat: ChatFormat
) -> list[PromptRow]:
    assert spec.norm_sampling is not None
    examples = load_examples(spec.data, kind="prompts", seed=context.seed)
    found: dict[tuple[int, ...], PromptRow] = {}
    for example in examples:
        row = chat.prompt_row(example)
        # By tokens: the same prompt would be sampled twice otherwise.
        found.setdefault(row.input_ids, row)
    kept, _ = fit_rows(
        list(found.values()),
        max_length=spec.max_length - spec.norm_sampling.max_new_tokens,
        # Reference responses need not cover the data; prompts that do not fit are left out.
        max_lost_frac=1.0,
        what=f"{context.name}: prompts of the reference responses",
        ledger=context.ledger,
    )
    return spread(kept, spec.norm_prompts)
