"""Rows and losses of reward models: pairs, labeled responses or labeled solution steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from align.core import distributed
from align.core.artifacts import Artifact
from align.core.types import PairRow, TokenRow
from align.data.render.chat import ChatFormat
from align.data.render.encoder_pairs import PairedFormat
from align.losses.preference import bradley_terry_loss, soft_labels
from align.losses.scorer import answer_loss, step_loss, tie_loss
from align.models.loading import load_tokenizer
from align.recipe.schema import RewardStage
from align.stages.base import chat_format
from align.training.batch import PackedBatch, label_probs, pack, pack_pairs
from align.training.own_code import own_losses
from reward_models.scalar import reads_first

Stats = dict[str, Tensor]
RowFormat = ChatFormat | PairedFormat


def scorer_format(artifact: Artifact) -> RowFormat:
    """Return the row format of a reward model, or of the policy or encoder it starts from."""
    if artifact.manifest["kind"] == "encoder" or reads_first(artifact.model_dir):
        return PairedFormat(load_tokenizer(artifact.model_dir))
    return chat_format(artifact.model_dir)


@dataclass(frozen=True, slots=True)
class WeightedPair:
    """A pair and its weight for each head."""

    pair: PairRow
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LabeledAnswer(TokenRow):
    """A tokenized response with its label and its weight for each head."""

    good: bool = False
    head_weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True)
class LabeledSteps(TokenRow):
    """A tokenized solution; ``ends`` are the positions of the last tokens of its steps."""

    ends: tuple[int, ...] = ()
    labels: tuple[bool, ...] = ()


def head_weights(num_rows: int, num_heads: int, *, seed: int) -> list[tuple[float, ...]]:
    """Return how often each row is in the bootstrap sample of each head: Poisson with mean 1.

    A single head sees every row once. The weights of a head sum to the number of rows only in
    expectation, so losses are divided by the number of rows.

    Reference: Oza and Russell 2001, "Online bagging and boosting".
    """
    if num_heads == 1:
        return [(1.0,)] * num_rows
    rng = np.random.default_rng(distributed.derive_seed(seed, "bootstrap"))
    drawn = rng.poisson(1.0, size=(num_rows, num_heads)).astype(float)
    return [tuple(row) for row in drawn.tolist()]


def final_scores(values: Tensor, batch: PackedBatch) -> Tensor:
    """Return the values at the stop token of each sequence, shape (num, heads)."""
    n = batch.segment_ids.numel()
    # A token is the last of its sequence if the next one belongs to another: (N,) mask.
    last = torch.ones(n, dtype=torch.bool, device=values.device)
    last[:-1] = batch.segment_ids[1:] != batch.segment_ids[:-1]
    # (1, N) or (1, N, heads) -> (N, heads) -> (num, heads)
    return values.reshape(n, -1)[last][: batch.num]


def _weights(batch: PackedBatch, num_heads: int) -> Tensor:
    """Return the weights of the sequences by head, shape (num, heads)."""
    return torch.stack([batch.per_sequence[f"weight/{k}"] for k in range(num_heads)], dim=1)


def collate_pairs(rows: Sequence[WeightedPair], batch: Sequence[WeightedPair]) -> PackedBatch:
    """Pack pairs; the global counts are all pairs of the batch, and those that are not ties."""
    return pack_pairs(
        [row.pair for row in rows],
        counts={
            "pairs": float(len(batch)),
            "ranked": float(sum(not row.pair.tie for row in batch)),
        },
        per_sequence={
            # per_sequence has one number per response, so values of a pair appear twice.
            "margin": [m for row in rows for m in (row.pair.margin,) * 2],
            "tie": [t for row in rows for t in (float(row.pair.tie),) * 2],
            **label_probs([row.pair for row in rows]),
            **{
                f"weight/{k}": [w for row in rows for w in (row.weights[k],) * 2]
                for k in range(len(batch[0].weights))
            },
        },
    )


def _pair_objective(spec: RewardStage, batch: PackedBatch) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function of one head's (chosen, rejected) scores, with soft labels."""
    certain = _certain_objective(spec, batch)
    if "label_prob" not in batch.per_sequence:
        return certain
    label_prob = batch.per_sequence["label_prob"][0::2]
    # The expected loss: as labeled with label_prob, exchanged with the rest.
    return lambda a, b: soft_labels(certain(a, b), certain(b, a), label_prob)


def _certain_objective(spec: RewardStage, batch: PackedBatch) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function of one head's (chosen, rejected) scores, with certain labels."""
    # (pairs,): per_sequence has the number of a pair twice.
    tie = batch.per_sequence["tie"][0::2] > 0.5
    if spec.own_loss:
        options = {
            "margin": batch.per_sequence["margin"][0::2],
            "tie": tie,
            "tie_margin": spec.tie_margin,
            "center_coef": spec.center_coef,
            "label_smoothing": spec.label_smoothing,
        }
        return partial(own_losses, spec.own_loss, each="pairs", options=options)
    if spec.tie_margin is not None:
        return partial(tie_loss, tie=tie, tie_margin=spec.tie_margin, center_coef=spec.center_coef)
    return partial(
        bradley_terry_loss,
        margin=batch.per_sequence["margin"][0::2] if spec.use_margin else None,
        center_coef=spec.center_coef,
        label_smoothing=spec.label_smoothing,
    )


def pair_loss(spec: RewardStage, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Stats]:
    """Return this micro-batch's part of the mean loss per pair and head."""
    values = model(batch.input_ids, batch.position_ids)
    scores = final_scores(values, batch)
    chosen, rejected = scores[0::2], scores[1::2]  # (pairs, heads)
    objective = _pair_objective(spec, batch)
    losses = [objective(chosen[:, k], rejected[:, k]) for k in range(spec.heads)]
    # Both rows of a pair carry the weights of the pair; take one of them.
    weighted = torch.stack(losses, dim=1) * _weights(batch, spec.heads)[0::2]
    # A tie has no winner: accuracy and margin count the other pairs only.
    gap = (chosen - rejected).mean(1)
    ranked = batch.per_sequence["tie"][0::2] < 0.5
    share = 1.0 / max(batch.counts["ranked"], 1.0)
    stats = {
        "accuracy": ((gap > 0) & ranked).sum() * share,
        "margin": (gap * ranked).sum() * share,
    }
    # Divided by pairs, not by the sum of weights, which is the same in expectation.
    total = weighted.sum() / (batch.counts["pairs"] * spec.heads)
    return total + 0.0 * values.sum(), stats


def collate_answers(rows: Sequence[LabeledAnswer], batch: Sequence[LabeledAnswer]) -> PackedBatch:
    """Pack responses; the global count is the responses of the whole batch."""
    return pack(
        rows,
        counts={"answers": float(len(batch))},
        per_sequence={
            "good": [float(row.good) for row in rows],
            **{
                f"weight/{k}": [row.head_weights[k] for row in rows]
                for k in range(len(batch[0].head_weights))
            },
        },
    )


def labeled_loss(
    model: nn.Module,
    batch: PackedBatch,
    *,
    spec: RewardStage,
    class_weights: tuple[float, float],
) -> tuple[Tensor, Stats]:
    """Return this micro-batch's part of the mean balanced cross-entropy per response and head."""
    values = model(batch.input_ids, batch.position_ids)
    scores = final_scores(values, batch)  # (responses, heads)
    good = batch.per_sequence["good"] > 0.5
    bad_weight, good_weight = class_weights
    options = {"good_weight": good_weight, "bad_weight": bad_weight}
    if spec.own_loss:
        objective = partial(own_losses, spec.own_loss, each="responses", options=options)
    else:
        objective = partial(answer_loss, **options)
    # (responses,) for each head.
    losses = [objective(scores[:, k], good) for k in range(spec.heads)]
    weighted = torch.stack(losses, dim=1) * _weights(batch, spec.heads)
    share = 1.0 / batch.counts["answers"]
    # An ensemble decides by the mean of its heads.
    right = (scores.mean(1) > 0) == good
    total = weighted.sum() * share / spec.heads
    return total + 0.0 * values.sum(), {"accuracy": right.sum() * share}


def class_weights(rows: Sequence[LabeledAnswer]) -> tuple[float, float]:
    """Return n / (2 n_class) of bad and good responses, so that both have the same total weight.

    Raises:
        ValueError: one class is empty.
    """
    num_good = sum(row.good for row in rows)
    num_bad = len(rows) - num_good
    if not num_good or not num_bad:
        raise ValueError(f"{num_good} good and {num_bad} bad responses; both kinds are needed")
    return len(rows) / (2.0 * num_bad), len(rows) / (2.0 * num_good)


def collate_steps(rows: Sequence[LabeledSteps], batch: Sequence[LabeledSteps]) -> PackedBatch:
    """Pack solutions; the global count is the judged steps of the whole batch."""
    # {position: label} of each row, then two dense vectors for packing.
    marks = [dict(zip(row.ends, row.labels, strict=True)) for row in rows]
    return pack(
        rows,
        counts={"steps": float(sum(len(row.ends) for row in batch))},
        per_token={
            "end": [
                [float(t in mark) for t in range(len(row.input_ids))]
                for row, mark in zip(rows, marks, strict=True)
            ],
            "label": [
                [float(mark.get(t, False)) for t in range(len(row.input_ids))]
                for row, mark in zip(rows, marks, strict=True)
            ],
        },
    )


def steps_loss(
    model: nn.Module, batch: PackedBatch, *, own: str | None = None
) -> tuple[Tensor, Stats]:
    """Return this micro-batch's part of the mean loss per step: cross-entropy, or ``own``."""
    values = model(batch.input_ids, batch.position_ids)
    # (1, N): where a step ends, and whether the solution is correct up to there.
    ends, labels = batch.per_token["end"] > 0.5, batch.per_token["label"]
    share = 1.0 / batch.counts["steps"]
    right = ((values > 0) == (labels > 0.5)) & ends
    if own is None:
        loss = step_loss(values, labels, ends)
    else:
        loss = own_losses(own, values[ends], labels[ends], each="steps")
    return loss.sum() * share + 0.0 * values.sum(), {"accuracy": right.sum() * share}
