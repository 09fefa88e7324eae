"""Sample groups of responses with seeds that depend only on the step and the prompt."""

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
    positions: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """Sample ``n`` responses to each prompt of a step.

    Args:
        engine: the sampler, already with the weights to use.
        prompts: this rank's prompts.
        n: responses per prompt.
        step: number of the online step.
        seed: the stage's seed.
        sampling: temperature, top_p and the length limit.
        stop_token_ids: tokens that end a response.
        positions: position of each prompt in the step's batch over all ranks, so that a prompt
            gets the same seed with any number of ranks; None numbers them from 0.

    Returns:
        ``n`` completions for each prompt.
    """
    # The position in the whole batch, not on this rank: results do not depend on the rank count.
    positions = range(len(prompts)) if positions is None else positions
    seeds = [derive_seed(seed, "rollout", step, i) for i in positions]
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
    """Sample this rank's part of the responses to prompts that all ranks share, as in evaluations.

    The same ``step`` always uses the same seeds, so that two policies can be compared prompt by
    prompt. The arguments are those of ``sample_groups``.
    """
    # Places in the whole list, which are also the numbers of the groups and of their seeds.
    mine = distributed.shard(range(len(prompts)))
    rows = [prompts[i] for i in mine]
    groups = sample_groups(
        engine,
        rows,
        n=n,
        step=step,
        seed=seed,
        sampling=sampling,
        stop_token_ids=stop_token_ids,
        positions=mine,
    )
    return gather_experience(rows, groups, group_numbers=mine)
