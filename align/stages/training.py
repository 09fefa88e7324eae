"""What the training stages share: policies in and out, data, and the offline schedule."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from align.core import distributed
from align.core.artefacts import Artefact, file_sha256
from align.core.log import MetricsLog
from align.core.types import Example
from align.data.augment import AugmentedRows
from align.data.chat import ChatFormat
from align.data.load import check_overlap, fit_rows, load_examples
from align.data.sources import data_fingerprint
from align.models.loading import load_policy, save_policy, set_dropout
from align.models.logprobs import LogprobModel
from align.online.weights import full_weights, gathered
from align.recipe.schema import DataSpec, OfflineStage, TrainingStage
from align.stages.base import StageContext, StageResult
from align.stages.best import BestWeights, build_stopping, stopping_notes
from align.stages.keeping import build_anchor, replayed
from align.training.learner import Learner
from align.training.offline import (
    OfflineSchedule,
    OfflineTask,
    total_steps,
    train_offline,
)
from align.training.stopping import EarlyStopping
from align.tuning.ewc import Anchor
from align.tuning.wrap import adapter_state, add_tuner, has_adapter

log = logging.getLogger(__name__)


def build_policy(spec: TrainingStage, model_dir: Path) -> LogprobModel:
    """Load the policy of a training stage and add what its recipe's ``tuning`` trains."""
    model: nn.Module = load_policy(
        model_dir, dtype=spec.dtype, gradient_checkpointing=spec.gradient_checkpointing
    )
    if spec.keep.dropout:
        set_dropout(model, spec.keep.dropout)
    model = add_tuner(model, spec.tuning)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    log.info("policy: %s parameters, %s trained", f"{total:,}", f"{trained:,}")
    return LogprobModel(model)


def save_trained_policy(
    spec: TrainingStage, module: LogprobModel, *, source: Artefact, out: Path
) -> None:
    """Write model/ (LoRA merged) and, for LoRA, adapter/; all ranks must take part."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in full_weights(module.model)}
    adapter = _whole_adapter(module.model) if has_adapter(module.model) else None
    if distributed.rank() == 0:
        save_policy(state, source_dir=source.model_dir, directory=out / "model", dtype=spec.dtype)
        if adapter is not None:
            from safetensors.torch import save_file

            (out / "adapter").mkdir(exist_ok=True)
            save_file(adapter, out / "adapter" / "adapter_model.safetensors")
            module.model.peft_config["default"].save_pretrained(str(out / "adapter"))
    distributed.barrier()


def _whole_adapter(model: nn.Module) -> dict[str, Tensor]:
    """Copy the adapter's tensors; under ZeRO-3 each rank holds but a part of them."""
    with gathered([p for p in model.parameters() if p.requires_grad]):
        return {k: v.detach().cpu().clone() for k, v in adapter_state(model).items()}


def offline_schedule(spec: OfflineStage, num_rows: int, seed: int) -> OfflineSchedule:
    """Derive the schedule of an offline stage from its recipe and the number of its rows."""
    return OfflineSchedule(
        total_steps=total_steps(
            num_rows, batch_size=spec.batch_size, epochs=spec.epochs, steps=spec.steps
        ),
        batch_size=spec.batch_size,
        micro_tokens=spec.micro_tokens,
        eval_every=spec.eval_every,
        checkpoint_every=spec.checkpoint_every,
        keep_checkpoints=spec.keep_checkpoints,
        seed=distributed.derive_seed(seed, "batches"),
    )


def offline_rows(
    spec: OfflineStage,
    context: StageContext,
    *,
    kind: Literal["sft", "preference", "unpaired", "steps"],
    render: Callable[[Example], Any],
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Load and tokenise training and held-out rows; no prompt may stand on both sides.

    Args:
        spec: the stage; its ``max_length`` and ``max_lost_frac`` bound what is lost.
        context: the stage's surroundings. kind: what the rows must hold.
        render: example -> tokenised row.
    """
    sides = {
        "training": load_examples(spec.data, kind=kind, seed=context.seed, mix_cap=spec.mix_cap),
        "held-out": load_examples(spec.heldout, kind=kind, seed=context.seed),
    }
    check_overlap(*sides.values())

    def fitted(name: str) -> Sequence[Any]:
        rows = [render(example) for example in sides[name]]
        if not rows:
            return []
        kept, _ = fit_rows(
            rows,
            max_length=spec.max_length,
            max_lost_frac=spec.max_lost_frac,
            what=f"{context.name}: {name} rows",
        )
        if spec.keep.augment is None or name == "held-out":
            return kept
        made_from = {id(row): example for row, example in zip(rows, sides[name], strict=True)}
        return AugmentedRows(
            kept,
            [made_from.get(id(row)) for row in kept],
            render,
            spec.keep.augment,
            seed=distributed.derive_seed(context.seed, "augment"),
            max_length=spec.max_length,
        )

    return fitted("training"), fitted("held-out")


def run_offline(
    module: nn.Module,
    task: OfflineTask[Any],
    spec: OfflineStage,
    context: StageContext,
    *,
    stopping: EarlyStopping | None,
    anchor: Anchor | None = None,
) -> dict[str, float]:
    """Train ``module`` on an offline task; give the last metrics."""
    schedule = offline_schedule(spec, len(task.rows), context.seed)
    learner = Learner(
        module,
        optim=spec.optim,
        zero=spec.zero,
        dtype=spec.dtype,
        total_steps=schedule.total_steps,
        layers=spec.layers,
        anchor=anchor,
    )
    metrics: MetricsLog = context.metrics(schedule.total_steps)
    final = train_offline(
        learner,
        task,
        schedule,
        metrics=metrics,
        checkpoints=context.out / "checkpoints",
        stopping=stopping,
    )
    metrics.close()
    return final


def fingerprints(*groups: Sequence[DataSpec]) -> list[dict[str, Any]]:
    """Give path, sha256 and rows of every file behind the data specs, for the manifest."""
    found: list[dict[str, Any]] = []
    for spec in (spec for group in groups for spec in group):
        if spec.path is not None:
            found += data_fingerprint(spec.path)
        else:
            found.append({"path": f"world:{spec.world}", "rows": spec.rows, "sha256": None})
        if spec.templates is not None:
            sha256 = file_sha256(Path(spec.templates))
            found.append({"path": spec.templates, "rows": None, "sha256": sha256})
    return found


def train_policy(
    spec: OfflineStage,
    module: LogprobModel,
    task: OfflineTask[Any],
    *,
    source: Artefact,
    chat: ChatFormat,
    context: StageContext,
) -> StageResult:
    """Train the policy of an offline stage, save it and sum the stage up."""
    anchor = build_anchor(spec, module, chat, context)
    write = partial(save_trained_policy, spec, module, source=source)
    best = BestWeights(write, context.out)
    stopping = build_stopping(spec, best)
    final = run_offline(module, task, spec, context, stopping=stopping, anchor=anchor)
    notes = {}
    if stopping is None:
        write(out=context.out)
    else:
        best.prune({stopping.best_step})
        best.restore(stopping.best_step)
        notes = stopping_notes(stopping)
    return StageResult(final, fingerprints(spec.data, spec.heldout, replayed(spec)), notes)
