"""Sample groups of answers with seeds that depend on nothing but the step and the prompt."""

from collections.abc import Sequence

from align.core import distributed
from align.core.distributed import derive_seed
from align.core.types import Completion, PromptRow
from align.recipe.schema import SamplingSpec
from align.sampling.engine import RolloutEngine
from align.sampling.experience import Experience, gather_experience


def sample_groups(
    engine: RolloutEngine,
    prompts: Sequence[PromptRow],
    *,
    n: int,
    step: int,
    seed: int,
    sampling: SamplingSpec,
    stop_token_ids: Sequence[int],
    first_position: int = 0,
) -> list[list[Completion]]:
    """Sample ``n`` answers to each prompt of a step.

    Args:
        engine: the sampler, already on the weights it shall answer with.
        prompts: this rank's prompts.
        n: answers per prompt.
        step: number of the online step.
        seed: the stage's seed.
        sampling: temperature, top_p and the length limit.
        stop_token_ids: tokens that end an answer.
        first_position: position of ``prompts[0]`` in the step's batch over all ranks, so that
            the same prompt is answered with the same seed by any number of ranks.

    Returns:
        For each prompt its ``n`` completions.
    """
    seeds = [derive_seed(seed, "rollout", step, first_position + i) for i in range(len(prompts))]
    return engine.generate(
        [row.input_ids for row in prompts],
        n=n,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seeds=seeds,
        stop_token_ids=stop_token_ids,
    )


def answer_fixed(
    engine: RolloutEngine,
    prompts: Sequence[PromptRow],
    *,
    n: int,
    step: int,
    seed: int,
    sampling: SamplingSpec,
    stop_token_ids: Sequence[int],
) -> Experience:
    """Let this rank answer its part of prompts that every rank holds, as evaluations do.

    The same ``step`` draws with the same seeds each time, so that two policies can be compared
    prompt by prompt. Arguments as of ``sample_groups``.
    """
    first = len(prompts) * distributed.rank() // distributed.world_size()
    mine = distributed.shard(prompts)
    groups = sample_groups(
        engine,
        mine,
        n=n,
        step=step,
        seed=seed,
        sampling=sampling,
        stop_token_ids=stop_token_ids,
        first_position=first,
    )
    return gather_experience(mine, groups, first_group=first)
