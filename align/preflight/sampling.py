"""Checks that sampler, trainer and reference policy agree before the first step."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor

from align.core.distributed import derive_seed
from align.core.types import Completion, PromptRow, TokenRow
from align.models.idle import in_use
from align.models.logprobs import LogprobModel, next_logits
from align.preflight.checks import Check, Finding, at_most, spread
from align.preflight.offline import own_forward
from align.recipe.schema import OnlineStage
from align.sampling.engine import RolloutEngine
from align.sampling.push import push, pushed_weights
from align.sampling.rollout import Experience, gather_experience
from align.sampling.rounding import (
    ENGINE_LIMIT,
    SAME_LIMIT,
    excess,
    rounded_cache,
    rounded_otherwise,
)
from align.training.batch import PackedBatch

Logprobs = Callable[[PackedBatch], Tensor]
NUM_PROMPTS, NUM_ANSWERS, MAX_TOKENS = 4, 2, 32


class Probe:
    """A few sampled responses, scored as the stage will score them.

    Args:
        spec: the stage. engine: the sampler, with the stage's initial weights.
        module: the policy, not yet wrapped by the Learner. reference: the frozen policy,
            ``module`` itself if its adapter is to be switched off, or None for no reference.
        prompts, stop_token_ids, seed: those of the stage.
    """

    def __init__(
        self,
        spec: OnlineStage,
        *,
        engine: RolloutEngine,
        module: LogprobModel,
        reference: LogprobModel | None,
        prompts: Sequence[PromptRow],
        stop_token_ids: Sequence[int],
        seed: int,
    ) -> None:
        self.spec, self.engine, self.module, self.reference = spec, engine, module, reference
        self.prompts = spread(prompts, NUM_PROMPTS)
        self.stop_token_ids = stop_token_ids
        # Seeds of their own: the check must not use up those of the first step.
        self.seeds = [derive_seed(seed, "preflight", i) for i in range(len(self.prompts))]

    def checks(self) -> list[Check]:
        """Return the checks, ordered so that an earlier failure explains later ones."""
        found: list[Check] = []
        if self.spec.tuning.method != "loreft":
            found.append(("own forward", self.own_forward))
        found += [
            ("sampler", self.sampler),
            ("greedy", self.greedy),
            ("ratio", self.ratio),
        ]
        return found if self.reference is None else [*found, ("reference", self.kl)]

    @cached_property
    def sampled(self) -> Experience:
        """Responses sampled with the temperature of the stage."""
        return self._answers(self.spec.sampling.temperature, NUM_ANSWERS)

    def own_answers(self) -> tuple[Sequence[PromptRow], Sequence[Completion]]:
        """Return the prompts and sampled responses as the rewards take them."""
        return self.sampled.prompts, self.sampled.completions

    def _answers(self, temperature: float, n: int) -> Experience:
        with self.engine.awake():
            # An engine on a GPU drops its weights when it goes to sleep.
            if self.engine.version != 0:
                push(self.engine, pushed_weights(self.module.model), version=0)
            groups = self.engine.generate(
                [row.input_ids for row in self.prompts],
                n=n,
                max_new_tokens=min(self.spec.sampling.max_new_tokens, MAX_TOKENS),
                temperature=temperature,
                seeds=self.seeds,
                stop_token_ids=self.stop_token_ids,
            )
        return gather_experience(self.prompts, groups)

    @cached_property
    def rounding(self) -> Tensor:
        """How much different rounding changes the policy's log-probabilities of sampled tokens."""
        batch = _whole(self.sampled)
        plain = self._logprobs(batch)
        with rounded_otherwise(self.module):
            return (self._logprobs(batch) - plain)[batch.mask].abs()

    @cached_property
    def engine_rounding(self) -> Tensor:
        """The same with the engine's cache, if it rounds keys and values."""
        if self.engine.cache_dtype is None:
            return self.rounding
        batch = _whole(self.sampled)
        plain = self._logprobs(batch)
        with (
            rounded_otherwise(self.module),
            rounded_cache(self.module, self.engine.cache_dtype),
        ):
            return (self._logprobs(batch) - plain)[batch.mask].abs()

    def _within(
        self,
        gap: Tensor,
        limit: float,
        *,
        what: str,
        remedy: str,
        fails: bool = True,
        of_engine: bool = False,
    ) -> Finding:
        """Return the finding for log-probability differences, in units of the model's rounding."""
        rounding = self.engine_rounding if of_engine else self.rounding
        cache = " with the engine's cache" if rounding is not self.rounding else ""
        return at_most(
            excess(gap, rounding),
            limit,
            unit=f"times the rounding of this model{cache} ({float(rounding.mean()):.2g} nats on "
            f"average) {what}: {float(gap.abs().mean()):.2g} nats on average, "
            f"{float(gap.abs().max()):.2g} at most, {gap.numel()} tokens",
            remedy=remedy,
            fails=fails,
        )

    def own_forward(self) -> Finding:
        """Compare prompts and their sampled responses packed, alone, and by the model itself."""
        ids = [
            (*prompt.input_ids, *said.token_ids)
            for prompt, said in zip(*self.own_answers(), strict=True)
        ]
        rows = [TokenRow(x, (True,) * len(x)) for x in spread(ids, NUM_PROMPTS)]
        return own_forward(self.spec, self.module, rows)

    def sampler(self) -> Finding:
        """Compare the sampler's log-probabilities with the trainer's, at the same temperature."""
        batch = _whole(self.sampled)
        gap = (batch.per_token["rollout_logprobs"] - self._logprobs(batch))[batch.mask]
        return self._within(
            gap,
            ENGINE_LIMIT,
            of_engine=True,
            what=f"between {self.engine.name} and trainer",
            remedy="sampler and trainer compute different log-probabilities. Use sampling.engine: "
            "hf, and report this with the versions of 'align doctor'",
        )

    def greedy(self) -> Finding:
        """Compare the sampler's greedy tokens with the most likely ones of the Hugging Face model.

        If they differ, the difference in log-probability must not exceed rounding.
        """
        batch = _whole(self._answers(0.0, 1))
        self.module.eval()
        logits = next_logits(self.module.model, batch.input_ids, batch.position_ids, batch.mask)
        ids = batch.input_ids[batch.mask]  # (n,)
        chosen = logits.gather(-1, ids[:, None])[:, 0]
        # 0 where the sampler chose the model's best token, else the gap between the two.
        behind = logits.max(-1).values - chosen
        return self._within(
            behind,
            ENGINE_LIMIT,
            of_engine=True,
            what=f"behind the model's best tokens; {int((behind == 0).sum())} of {len(ids)} greedy "
            f"tokens of {self.engine.name} are the best",
            remedy="the sampler's greedy tokens are not those of the model. Use sampling.engine: "
            "hf",
        )

    def ratio(self) -> Finding:
        """Compare log-probabilities of responses run one by one and packed as in an update."""
        # PPO's ratio is 1 only if a response has the same log-probabilities however it is packed.
        together = _spread(self.sampled, [list(range(len(self.sampled.lengths)))], self._logprobs)
        alone = _spread(
            self.sampled, [[i] for i in range(len(self.sampled.lengths))], self._logprobs
        )
        return self._within(
            (together - alone)[self.sampled.completion],
            SAME_LIMIT,
            what="between responses packed and alone",
            remedy="log-probabilities depend on what a response is packed with. Report this with "
            "the versions of 'align doctor'",
        )

    def kl(self) -> Finding:
        """Compare the reference with the policy on sampled responses: their KL must start at 0.

        A new adapter changes only the rounding: dora divides by norms, oft rotates.
        """
        assert self.reference is not None
        batch = _whole(self.sampled)
        own = self.reference is self.module
        policy = self._logprobs(batch)
        # With an adapter, the reference is the policy's own weights without it.
        with self.module.model.disable_adapter() if own else nullcontext():
            reference = self._logprobs(batch, self.reference)
        # (n,): of the sampled tokens alone, in nats.
        gap = (policy - reference)[batch.mask]
        virtual = self.spec.tuning.virtual
        return self._within(
            gap,
            ENGINE_LIMIT,
            what=f"between policy and reference, KL {float(gap.mean()):.2g} a token",
            remedy="the policy differs from its reference before the first step"
            + (
                f", as {self.spec.tuning.method} tuning does"
                if virtual
                else ". The reference must be the model that the stage starts from"
            ),
            fails=not virtual,
        )

    @torch.no_grad()
    def _logprobs(self, batch: PackedBatch, model: LogprobModel | None = None) -> Tensor:
        model = model or self.module
        model.eval()
        temperature = self.spec.sampling.temperature
        with in_use(model):
            return model(
                batch.input_ids, batch.position_ids, temperature=temperature, mask=batch.mask
            ).logprobs


def _whole(experience: Experience) -> PackedBatch:
    return experience.micro(list(range(len(experience.lengths))), {})


def _spread(experience: Experience, parts: Sequence[list[int]], logprobs: Logprobs) -> Tensor:
    out = torch.zeros(experience.input_ids.shape)
    for rows in parts:
        experience.spread(rows, logprobs(experience.micro(rows, {})), out)
    return out
