"""Rollouts: sampled groups of responses, and the experience with the tensors of one step.

Seeds depend only on the step and the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from align.core import distributed
from align.core.distributed import derive_seed
from align.core.types import Completion, PromptRow
from align.recipe.schema import SamplingSpec
from align.sampling.engine import RolloutEngine
from align.training.batch import PackedBatch, pack


@dataclass(frozen=True, slots=True)
class Experience:
    """B responses as right-padded rows of T tokens, prompt and completion together.

    Attributes:
        input_ids: (B, T).
        lengths: (B,) number of real tokens in each row.
        mask: (B, T) bool, True on the completion tokens that are trained.
        completion: (B, T) bool, True on every completion token, trained or not.
        scores: (B,) one score per response; nan if no reward could score it.
        truncated: (B,) bool, True if no stop token was sampled.
        group_ids: (B,) number of the prompt in the step's batch over all ranks.
        greedy_scores: (B,) score of the greedy response to the same prompt; None if not requested.
        bootstrap: (B,) value after a truncated response, else 0; None if not requested.
        per_token: rollout_logprobs, old_logprobs, ref_logprobs, values, advantages, returns (B, T).
        prompts: the prompt of each row.
        completions: the completion of each row.
    """

    input_ids: Tensor
    lengths: Tensor
    mask: Tensor
    completion: Tensor
    scores: Tensor
    truncated: Tensor
    group_ids: Tensor
    greedy_scores: Tensor | None = None
    bootstrap: Tensor | None = None
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    prompts: Sequence[PromptRow] = ()
    completions: Sequence[Completion] = ()

    def with_tokens(self, **tensors: Tensor) -> "Experience":
        """Return a copy with additional (B, T) tensors by name."""
        return replace(self, per_token={**self.per_token, **tensors})

    def shared(self, rows: Sequence[int]) -> list[int]:
        """Return the number of leading tokens that each of ``rows`` shares with the previous one.
        The prompt of adjacent responses to the same prompt is computed only once.
        """
        # Without rows, an empty tensor of dtype float could not index.
        index = torch.tensor(list(rows), dtype=torch.long)
        prompt_tokens = (self.lengths[index] - self.completion[index].sum(1)).tolist()
        groups = self.group_ids[index].tolist()
        # The first row shares nothing, since no row precedes it.
        before = [None, *groups]
        return [
            tokens if group == last else 0
            for tokens, group, last in zip(prompt_tokens, groups, before, strict=False)
        ]

    def micro(self, rows: Sequence[int], counts: Mapping[str, float]) -> PackedBatch:
        """Return rows as a packed batch; without rows, a placeholder with zero tensors."""
        if not rows:
            empty = pack([], counts=counts)
            zeros = torch.zeros(empty.mask.shape, device=empty.mask.device)
            return replace(empty, per_token=dict.fromkeys(self.per_token, zeros))
        # The experience stays on the CPU; only the packed micro-batch is moved.
        index, device = torch.tensor(list(rows)), distributed.device()
        at = torch.arange(self.input_ids.shape[1]).expand(len(rows), -1)  # (b, T)
        skip = torch.tensor(self.shared(rows)).unsqueeze(1)
        # Real tokens of each row without those that the previous row already contains.
        own = (at >= skip) & (at < self.lengths[index].unsqueeze(1))  # (b, T)

        def flat(x: Tensor) -> Tensor:
            # (b, T) -> (N,) in row order -> (1, N)
            return x[index][own].unsqueeze(0).to(device)

        number = torch.arange(len(rows)).unsqueeze(1).expand_as(at)
        return PackedBatch(
            input_ids=flat(self.input_ids),
            position_ids=at[own].unsqueeze(0).to(device),
            mask=flat(self.mask),
            segment_ids=number[own].to(device),
            num=len(rows),
            counts=dict(counts),
            per_token={name: flat(x) for name, x in self.per_token.items()},
        )

    def spread(self, rows: Sequence[int], packed: Tensor, out: Tensor) -> None:
        """Write a packed (1, N) result of ``rows`` back into the (B, T) tensor ``out``.

        A prompt that is computed once is written only to the first of its responses.
        """
        # Walk the packed row; each response has its length minus the shared prompt.
        start = 0
        for row, skip in zip(rows, self.shared(rows), strict=True):
            end = int(self.lengths[row])
            out[row, skip:end] = packed[0, start : start + end - skip].float().cpu()
            start += end - skip


def gather_experience(
    prompts: Sequence[PromptRow],
    groups: Sequence[Sequence[Completion]],
    *,
    group_numbers: Sequence[int] | None = None,
) -> Experience:
    """Return sampled groups as rows; scores are nan until they are set.

    Args:
        prompts: this rank's prompts.
        groups: the completions of each prompt.
        group_numbers: number of each prompt in the step's batch over all ranks; None numbers them
            from 0.
    """
    flat = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    ids = [list(p.input_ids) + list(c.token_ids) for p, c in flat]
    width = max(map(len, ids), default=0)  # a rank may have no prompts
    shape = (len(flat), width)
    input_ids = torch.zeros(shape, dtype=torch.long)
    completion = torch.zeros(shape, dtype=torch.bool)
    rollout = torch.zeros(shape)
    # Rows are right-padded: prompt, then response.
    for i, (prompt, answer) in enumerate(flat):
        start = len(prompt.input_ids)
        input_ids[i, : len(ids[i])] = torch.tensor(ids[i])
        completion[i, start : len(ids[i])] = True
        rollout[i, start : len(ids[i])] = torch.tensor(answer.logprobs)
    names = range(len(groups)) if group_numbers is None else group_numbers
    numbers = [g for g, group in zip(names, groups, strict=True) for _ in group]
    return Experience(
        input_ids=input_ids,
        lengths=torch.tensor([len(row) for row in ids], dtype=torch.long),
        mask=completion.clone(),
        completion=completion,
        scores=torch.full((len(flat),), float("nan")),
        truncated=torch.tensor([c.finish_reason != "stop" for _, c in flat], dtype=torch.bool),
        group_ids=torch.tensor(numbers, dtype=torch.long),
        per_token={"rollout_logprobs": rollout},
        prompts=[p for p, _ in flat],
        completions=[c for _, c in flat],
    )


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
