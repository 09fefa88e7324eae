"""Stage dpo: direct preference optimization with reference log-probabilities computed once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from align.core.errors import DataError
from align.core.types import PairRow
from align.losses.preference import (
    PreferenceLoss,
    dpo_loss,
    orpo_loss,
    simpo_loss,
    soft_labels,
    tail_weights,
)
from align.recipe.schema import DpoStage
from align.stages.base import Prepared, StageContext, chat_format
from align.stages.offline import build_policy, load_init, offline_rows, prepare_policy
from align.stages.reference import reference_file, rows_needed
from align.training.batch import PackedBatch, label_probs, pack_pairs, pair_length
from align.training.infer import map_rows
from align.training.own_code import own_losses
from align.training.results import ResultFile
from align.training.task import OfflineTask
from align.tuning.reference import start_policy


@dataclass(frozen=True, slots=True)
class ReferencePair:
    """A pair with the reference's log-probabilities of both responses (nats, token sums).

    Both are 0 for a loss without a reference, and NaN for a pair that no step draws.
    """

    pair: PairRow
    ref_chosen: float
    ref_rejected: float


def prepare(spec: DpoStage, context: StageContext) -> Prepared:
    """Load the pairs, build the policy and compute the reference log-probabilities with it."""
    source = load_init(spec, context)
    chat = chat_format(source.model_dir)
    data = offline_rows(spec, context, render=chat.pair_row)
    pairs, num_training = [*data.training, *data.heldout], len(data.training)
    refuse_ties(pairs)
    module = build_policy(spec, source.model_dir, seed=context.seed)
    if spec.reference_free:
        rows = [ReferencePair(pair, 0.0, 0.0) for pair in pairs]
    else:
        needed = rows_needed(
            spec, context, num_training=num_training, num_heldout=len(data.heldout)
        )
        # Before the first step the policy is the reference, unless a new adapter changes it.
        with start_policy(module.model, spec.tuning, source.model_dir):
            rows = reference_pairs(
                module,
                pairs,
                micro_tokens=spec.micro_tokens,
                ld_alpha=spec.ld_alpha,
                needed=needed,
                store=reference_file(context, needed),
            )
    # Reference values were computed for training and held-out pairs in one pass.
    task = OfflineTask(
        rows[:num_training],
        rows[num_training:],
        lambda row: pair_length(row.pair),
        collate,
        partial(preference_loss, spec),
    )
    return prepare_policy(
        spec, context, data=data, module=module, task=task, source=source, chat=chat
    )


def refuse_ties(pairs: Sequence[PairRow]) -> None:
    """Raise DataError for ties, which DPO would train as if the first response had won.

    Raises:
        DataError: with how many there are and the first place.
    """
    ties = [pair.source for pair in pairs if pair.tie]
    if ties:
        raise DataError(
            f"{ties[0]}: tie: true ({len(ties)} ties in all), but dpo needs a winner in each pair. "
            "Remove these rows, or train a reward stage with tie_margin on them"
        )


def reference_pairs(
    module: nn.Module,
    pairs: Sequence[PairRow],
    *,
    micro_tokens: int,
    ld_alpha: float | None = None,
    needed: Sequence[int] | None = None,
    store: ResultFile | None = None,
) -> list[ReferencePair]:
    """Return the pairs with reference log-probabilities; the work is split across ranks.

    Args:
        module: the reference. pairs: all pairs. micro_tokens: token budget of one pass.
        ld_alpha: weight of the tail of the longer response.
        needed: places of the pairs to compute, None for all; the others get NaN.
        store: keeps the results for a resumed stage.
    """
    places = range(len(pairs)) if needed is None else needed

    def sums(model: nn.Module, batch: PackedBatch) -> list[tuple[float, float]]:
        logprobs = model(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs  # (1, N)
        both = answer_sums(logprobs, batch, ld_alpha=ld_alpha).view(-1, 2)  # (pairs, 2)
        return [(chosen, rejected) for chosen, rejected in both.tolist()]

    found = map_rows(
        module,
        [pairs[i] for i in places],
        sums,
        length=pair_length,
        collate=pack_pairs,
        micro_tokens=micro_tokens,
        store=store,
    )
    known = dict(zip(places, found, strict=True))
    unknown = (math.nan, math.nan)
    return [ReferencePair(pair, *known.get(i, unknown)) for i, pair in enumerate(pairs)]


def collate(rows: Sequence[ReferencePair], batch: Sequence[ReferencePair]) -> PackedBatch:
    """Pack pairs; the global count is the number of pairs in the batch."""
    return pack_pairs(
        [row.pair for row in rows],
        counts={"pairs": float(len(batch))},
        per_sequence={
            "ref": [x for row in rows for x in (row.ref_chosen, row.ref_rejected)],
            **label_probs([row.pair for row in rows]),
        },
    )


def answer_sums(logprobs: Tensor, batch: PackedBatch, *, ld_alpha: float | None) -> Tensor:
    """Return summed log-probabilities of each response; ``ld_alpha`` weights the longer's tail."""
    if ld_alpha is not None and batch.num:
        # LD-DPO: tokens beyond the shorter response of the pair count less.
        weights = tail_weights(batch.mask[0], batch.segment_ids, batch.num, alpha=ld_alpha)
        logprobs = logprobs * weights
    return batch.segment_sums(logprobs)


def preference_loss(
    spec: DpoStage, model: nn.Module, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this micro-batch's part of the mean loss per pair and of the logged metrics."""
    logprobs = model(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs
    # (2 pairs,), chosen and rejected in turn; an empty micro-batch gives empty tensors.
    sums, lengths = batch.segment_sums(logprobs), batch.segment_sums(batch.mask.float())
    means, ref = sums / lengths.clamp(min=1), batch.per_sequence["ref"]
    share = 1.0 / batch.counts["pairs"]
    sides = Sides(
        answer_sums(logprobs, batch, ld_alpha=spec.ld_alpha), means, ref, ref / lengths.clamp(min=1)
    )
    result = pair_losses(spec, sides)
    # The NLL term keeps the chosen response likely (arXiv:2404.19733).
    loss = result.loss - spec.nll_coef * means[0::2]
    if "label_prob" in batch.per_sequence:
        # With an uncertain label, the loss is the expectation over both orders.
        turned = pair_losses(spec, sides.exchanged()).loss - spec.nll_coef * means[1::2]
        loss = soft_labels(loss, turned, batch.per_sequence["label_prob"][0::2])
    margins = result.chosen_rewards - result.rejected_rewards
    stats = {
        "chosen_logprob": sums[0::2].sum() * share,
        "margin": margins.sum() * share,
        "accuracy": _fraction_preferred(margins, spec, sides) * share,
    }
    return loss.sum() * share + 0.0 * logprobs.sum(), stats


def _fraction_preferred(margins: Tensor, spec: DpoStage, sides: "Sides") -> Tensor:
    """Return the number of pairs, (), whose chosen response has the larger reward; a tie is half.

    Before the first step policy and reference are one model. Their margins are 0 up to rounding,
    which also differs with the layout of the batch: such a pair is a tie, neither right nor wrong.
    """
    values = sides.means if spec.on_means else sides.sums  # (2 pairs,)
    sizes = values.detach().abs().view(-1, 2).sum(1)
    rounding = 4.0 * torch.finfo(torch.float32).eps * spec.beta * sizes
    ties = margins.abs() <= rounding
    return ((margins > 0) & ~ties).sum() + 0.5 * ties.sum()


@dataclass(frozen=True, slots=True)
class Sides:
    """Log-probabilities (2 B,), alternating chosen and rejected, as sums and as means."""

    sums: Tensor
    means: Tensor
    ref_sums: Tensor
    ref_means: Tensor

    def exchanged(self) -> "Sides":
        """Return the same pairs with chosen and rejected exchanged."""
        parts = (self.sums, self.means, self.ref_sums, self.ref_means)
        return Sides(*(x.view(-1, 2).flip(1).reshape(-1) for x in parts))


def _own_losses(spec: DpoStage, sides: Sides) -> PreferenceLoss:
    """Return the losses of the user's function; the implicit rewards are those of DPO."""
    policy, ref = sides.sums, sides.ref_sums
    found = own_losses(
        spec.loss,
        *(policy[0::2], policy[1::2], ref[0::2], ref[1::2]),
        each="pairs",
        options={"beta": spec.beta, "label_smoothing": spec.label_smoothing, "gamma": spec.gamma},
    )
    rewards = (spec.beta * (policy - ref)).detach()
    return PreferenceLoss(found, rewards[0::2], rewards[1::2])


def pair_losses(spec: DpoStage, sides: Sides) -> PreferenceLoss:
    """Return the loss of each pair for the loss type of the recipe.

    ``ipo`` uses means per token, the convention of its authors according to TRL.
    """
    eps, means = spec.label_smoothing, sides.means
    if spec.own_loss:
        return _own_losses(spec, sides)
    if spec.loss == "orpo":
        return orpo_loss(means[0::2], means[1::2], beta=spec.beta)
    if spec.loss == "simpo":
        gamma = spec.beta / 2 if spec.gamma is None else spec.gamma
        return simpo_loss(
            means[0::2], means[1::2], beta=spec.beta, gamma=gamma, label_smoothing=eps
        )
    policy, ref = (means, sides.ref_means) if spec.on_means else (sides.sums, sides.ref_sums)
    return dpo_loss(
        policy[0::2],
        policy[1::2],
        ref[0::2],
        ref[1::2],
        beta=spec.beta,
        label_smoothing=eps,
        kind=spec.loss,
    )
