"""Stage reward: a Bradley-Terry scorer over the final token, that knows its own mean and std."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.core import distributed
from align.core.artefacts import Artefact, write_json_atomic
from align.core.types import PairRow, TokenRow
from align.data.batching import plan_micro_batches
from align.losses.preference import bradley_terry_loss
from align.models.attention import segments_from_positions
from align.models.heads import scorer_from
from align.models.loading import load_tokenizer, set_dropout
from align.online.weights import full_weights
from align.preflight.checks import Seen
from align.recipe.schema import RewardStage
from align.stages.base import StageContext, StageResult, chat_format
from align.stages.best import BestWeights, build_stopping, stopping_notes
from align.stages.dpo import both, pack_pairs, pair_length
from align.stages.preflight import preflight_offline
from align.stages.training import fingerprints, offline_rows, run_offline, whole_state
from align.training.batch import PackedBatch, pack
from align.training.offline import OfflineTask
from align.tuning.files import num_trained, save_adapter, with_adapter
from align.tuning.loading import quantization
from align.tuning.wrap import add_tuner
from reward_models.scalar import SCORER_FILE, RewardModel

log = logging.getLogger(__name__)


def run(spec: RewardStage, context: StageContext) -> StageResult:
    """Train a scorer, begun from the policy ``spec.init``, to rank the pairs of ``spec.data``."""
    source = context.artefact(spec.init, "policy")
    chat = chat_format(source.model_dir)
    render = Seen(chat.pair_row)
    rows, watched = offline_rows(spec, context, kind="preference", render=render)
    torch.manual_seed(distributed.derive_seed(context.seed, "head"))
    model = load_scorer(spec, source)
    task = OfflineTask(rows, watched, pair_length, collate, partial(scorer_loss, spec))
    module = SequenceValues(model)
    preflight_offline(
        spec, context, chat=chat, source=source, module=module, model=model.backbone, task=task,
        examples=render.examples,
    )  # fmt: skip
    best = BestWeights(partial(save_scorer, spec, model, source), context.out)
    stopping = build_stopping(spec, best)
    final = run_offline(module, task, spec, context, stopping=stopping)
    notes = {}
    if stopping is not None:
        best.prune({stopping.best_step})
        best.restore(stopping.best_step)
        notes = stopping_notes(stopping)
        kept = context.out / "model"
        model = scorer_from(kept, dtype=spec.dtype).to(distributed.device())
        model.backbone = with_adapter(model.backbone, kept)
    mean, std = normalisation(model, rows[: spec.norm_prompts], micro_tokens=spec.micro_tokens)
    if stopping is None:
        save_scorer(spec, model, source, context.out, mean=mean, std=std)
    elif distributed.rank() == 0:
        write_normalisation(context.out / "model", mean=mean, std=std)
    log.info("scores of %d reference pairs: mean %.3f, std %.3f", spec.norm_prompts, mean, std)
    final |= {"scorer/mean": mean, "scorer/std": std}
    return StageResult(final, fingerprints(spec.data, spec.heldout), notes)


def load_scorer(spec: RewardStage, source: Artefact) -> RewardModel:
    """Put a fresh score head on the decoder of ``source``; add what ``tuning`` trains."""
    model = scorer_from(
        source.model_dir, dtype=spec.dtype, quantization=quantization(spec.tuning, spec.dtype)
    )
    backbone: Any = model.backbone
    if spec.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        if spec.tuning.method not in ("full", "head"):
            backbone.enable_input_require_grads()
    if spec.keep.dropout:
        set_dropout(model, spec.keep.dropout)
    model.backbone = add_tuner(backbone, spec.tuning, seed=spec.seed or 0)
    trained, total = num_trained(model)
    log.info("scorer: %s parameters, %s trained", f"{total:,}", f"{trained:,}")
    return model.to(distributed.device())


class SequenceValues(nn.Module):
    """Give one value per token of a packed row, without padding: (1, N)."""

    def __init__(self, model: RewardModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Score every token of the packed row in the light of its sequence so far."""
        segments = segments_from_positions(position_ids[0])
        return self.model(input_ids, position_ids=position_ids, segments=segments)


def final_scores(values: Tensor, batch: PackedBatch) -> Tensor:
    """Pick the value at the last token of each sequence, the stop token it was trained with."""
    n = batch.segment_ids.numel()
    last = torch.ones(n, dtype=torch.bool, device=values.device)
    last[:-1] = batch.segment_ids[1:] != batch.segment_ids[:-1]
    return values[0][last][: batch.num]


def collate(rows: Sequence[PairRow], batch: Sequence[PairRow]) -> PackedBatch:
    """Pack pairs; the global count is the pairs of the whole batch."""
    return pack_pairs(
        rows,
        counts={"pairs": float(len(batch))},
        per_sequence={"margin": [m for row in rows for m in (row.margin, row.margin)]},
    )


def scorer_loss(
    spec: RewardStage, model: nn.Module, batch: PackedBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give this micro-batch's share of the mean Bradley-Terry loss per pair."""
    values = model(batch.input_ids, batch.position_ids)
    scores = final_scores(values, batch)
    chosen, rejected = scores[0::2], scores[1::2]
    loss = bradley_terry_loss(
        chosen,
        rejected,
        margin=batch.per_sequence["margin"][0::2] if spec.use_margin else None,
        center_coef=spec.center_coef,
        label_smoothing=spec.label_smoothing,
    )
    share = 1.0 / batch.counts["pairs"]
    stats = {
        "accuracy": (chosen > rejected).sum() * share,
        "margin": (chosen - rejected).sum() * share,
    }
    return loss.sum() * share + 0.0 * values.sum(), stats


@torch.no_grad()
def normalisation(
    model: RewardModel, pairs: Sequence[PairRow], *, micro_tokens: int
) -> tuple[float, float]:
    """Measure mean and population std of the scores of reference answers (arXiv:1909.08593)."""
    if not pairs:
        return 0.0, 1.0
    values = SequenceValues(model).eval()
    rows: list[TokenRow] = both(pairs)
    plan = plan_micro_batches([len(r.input_ids) for r in rows], micro_tokens=micro_tokens, ranks=1)[
        0
    ]
    scores: list[float] = []
    for micro in plan:
        batch = pack([rows[i] for i in micro])
        scores += final_scores(values(batch.input_ids, batch.position_ids), batch).tolist()
    found = torch.tensor(scores, dtype=torch.float64)
    return float(found.mean()), max(float(found.std(correction=0)), 1e-6)


def save_scorer(
    spec: RewardStage,
    model: RewardModel,
    source: Artefact,
    out: Path,
    *,
    mean: float = 0.0,
    std: float = 1.0,
) -> None:
    """Write model/ and, with an adapter, adapter/ below ``out``; all ranks must take part."""
    model.set_normalisation(mean=mean, std=std)
    backbone, adapter = whole_state(spec, model.backbone, source)
    state = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    state |= {f"head.{n}": t.detach().cpu().clone() for n, t in full_weights(model.head)}
    if distributed.rank() == 0:
        if adapter is not None:
            save_adapter(*adapter, out / "adapter")
        model.save(
            out / "model",
            tokenizer=load_tokenizer(source.model_dir),
            state_dict=state,
        )
    distributed.barrier()


def write_normalisation(model_dir: Path, *, mean: float, std: float) -> None:
    """Put mean and std into a saved scorer; its other files may be shared with ``best/``."""
    path = model_dir / SCORER_FILE
    plain = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    write_json_atomic(path, {**plain, "mean": mean, "std": std})
