"""Shared parts of the training stages: loading and saving policies, data, the schedule."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from align.core import distributed
from align.core.artifacts import Artifact, read_manifest
from align.core.errors import ArtifactError, TrainingError
from align.core.groups import share_rows
from align.core.log import MetricsLog
from align.core.types import Example, TokenRow
from align.data.augment import AugmentedRows
from align.data.fit import fit_rows
from align.data.load import check_overlap, fingerprints, load_examples
from align.data.render.chat import ChatFormat
from align.data.store.source import chosen, fit_loaded, load_rows
from align.models.loading import check_length
from align.models.logprobs import LogprobModel
from align.preflight.checks import MAX_SEEN, Check, spread
from align.preflight.contamination import contamination_checks
from align.preflight.disk import disk_checks
from align.recipe.schema import DataSpec, OfflineStage, OnlineStage, TrainingStage
from align.stages.base import Prepared, StageContext, StageResult
from align.stages.best import BestWeights, build_stopping, stopping_notes, tidy_after
from align.stages.preflight import offline_checks, row_views
from align.stages.saving import save_trained_policy
from align.training.batch import pack
from align.training.deepspeed import config_of_shards
from align.training.diagnosis import Diagnosis
from align.training.learner import Learner
from align.training.offline import (
    OfflineSchedule,
    OfflineTask,
    evaluate_rows,
    total_steps,
    train_offline,
)
from align.training.own_code import check_loss_options
from align.training.stopping import EarlyStopping
from align.training.stops import NUM_ROWS, never_stops, stop_probabilities
from align.tuning.ewc import Anchor, anchor_at, fisher_diagonal, scaled
from align.tuning.files import num_trained
from align.tuning.loading import check_start, load_for_training, load_tuned_policy
from align.tuning.merging import has_adapter, merges
from align.tuning.wrap import add_tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOSS_SAVED = "eval/loss_saved"
SAVED_LIMIT = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest change of the held-out loss by merging: in nats, or as a fraction of a loss above 1."""
Model = TypeVar("Model", bound=nn.Module)


def read_back(load: Callable[[], Model], *, what: str = LOSS_SAVED) -> Model | None:
    """Load the saved model next to the trained one; return None on every rank if it does not fit.

    It takes up to four times the memory of a model in 4 bits. ``what`` is then not measured, which
    is said and does not stop the stage: its weights are saved. Every rank must call this.
    """
    try:
        model = load()
    except torch.OutOfMemoryError:
        model = None
    if distributed.global_sum(float(model is None)):
        log.warning(
            "the saved model does not fit in memory next to the trained one: %s is not measured. "
            "An evaluate stage can score the saved model",
            what,
        )
        return None
    return model


def saved_loss(model: nn.Module, task: OfflineTask[Any], micro_tokens: int) -> dict[str, float]:
    """Return the held-out loss of the saved model under its own name; empty without held-out rows.

    The reference log-probabilities of dpo and kto remain those of the 4-bit initial model.
    """
    if not task.heldout:
        return {}
    return {LOSS_SAVED: evaluate_rows(model, task, micro_tokens)["eval/loss"]}


def check_saved_loss(final: Mapping[str, float], *, dtype: str) -> None:
    """Check that the saved weights have the held-out loss of the trained policy.

    Raises:
        TrainingError: the losses differ, so merging changed the model.
    """
    trained, saved = final["eval/loss"], final[LOSS_SAVED]
    # Relative to the loss above 1 nat, absolute below.
    limit = SAVED_LIMIT[dtype] * max(1.0, abs(trained))
    if not abs(saved - trained) <= limit:
        raise TrainingError(
            f"{LOSS_SAVED}: the merged weights in model/ have a held-out loss of {saved:.4g}, the "
            f"trained policy {trained:.4g}; expected at most {limit:.2g} between them in {dtype}. "
            "The adapter is in adapter/: merge it in float32 (dtype: float32), or report this with "
            "the versions of 'align doctor'"
        )


def build_anchor(
    spec: OfflineStage | OnlineStage,
    module: LogprobModel,
    chat: ChatFormat,
    *,
    context: StageContext,
) -> Anchor | None:
    """Return the EWC anchor of the old task at the current weights; None without ``keep.ewc``."""
    ewc = spec.keep.ewc
    if ewc is None:
        return None
    rows, _ = fit_rows(
        [chat.sft_row(e) for e in load_examples(ewc.data, kind="sft", seed=context.seed)],
        max_length=spec.max_length,
        max_lost_frac=spec.max_lost_frac,
        what=f"{context.name}: keep.ewc.data",
        ledger=context.ledger,
    )
    fisher = scaled(fisher_diagonal(module, rows, log_likelihood), cap=ewc.cap)
    log.info("Fisher information of %d rows of the old task measured", len(rows))
    return anchor_at(module, fisher, coef=ewc.coef)


def replayed(spec: OfflineStage | OnlineStage) -> list[DataSpec]:
    """Return the old task's data that the stage reads, for the manifest."""
    return [] if spec.keep.ewc is None else spec.keep.ewc.data


def log_likelihood(module: nn.Module, row: TokenRow) -> Tensor:
    """Return the sum of the log-probabilities (nats) of a row's trained tokens."""
    batch = pack([row])
    return module(batch.input_ids, batch.position_ids, mask=batch.mask).logprobs.sum()


log = logging.getLogger(__name__)


def load_init(spec: TrainingStage, context: StageContext) -> Artifact:
    """Return the policy that a stage starts from; raise if its tuning cannot be continued."""
    source = context.artifact(spec.init, "policy", with_adapter=True)
    made_by = source.manifest.get("spec", {}).get("tuning")
    check_start(source.model_dir, made_by, spec.tuning)
    check_length(source.model_dir, spec.max_length)
    return source


def load_backbone(spec: TrainingStage, context: StageContext) -> Artifact:
    """Return the policy or encoder that a stage puts a new head on."""
    # The manifest says which of the two it is, so that the recipe need not.
    kind = read_manifest(context.folder_of(spec.init))["kind"]
    source = context.artifact(spec.init, "encoder" if kind == "encoder" else "policy")
    check_length(source.model_dir, spec.max_length)
    return source


def refuse_random(missing: Sequence[str], spec: TrainingStage, source: Artifact) -> None:
    """Check that no weight below a new head is missing unless ``tuning`` trains it.

    Raises:
        ArtifactError: a missing weight would stay random.
    """
    if missing and spec.tuning.method != "full":
        raise ArtifactError(
            f"{source.path}: no weights for {', '.join(missing[:3])}, which would stay random "
            f"with tuning.method {spec.tuning.method}. Use full, or a model that has them"
        )


def build_policy(spec: TrainingStage, model_dir: Path, *, seed: int = 0) -> LogprobModel:
    """Return the policy of a training stage with the adapter of its ``tuning``.

    From here on, ranks share rows as the stage says.
    """
    share_rows(spec.sequence_ranks)
    model = load_for_training(
        model_dir,
        spec.tuning,
        dtype=spec.dtype,
        gradient_checkpointing=spec.gradient_checkpointing,
        dropout=spec.keep.dropout,
        seed=distributed.derive_seed(seed, "tuning"),
        shards=config_of_shards(spec),
    )
    trained, total = num_trained(model)
    log.info("policy: %s parameters, %s trained", f"{total:,}", f"{trained:,}")
    return LogprobModel(model)


def add_tuner_to_backbone(
    spec: OfflineStage, backbone: "PreTrainedModel", *, seed: int, tokens: Sequence[int] = ()
) -> Any:
    """Return the model below a new head with the adapter of ``tuning``.

    Args:
        spec: the stage. backbone: the model. seed: random seed of the adapter's weights.
        tokens: tokens whose rows are trained too; see ``tokens_to_train``.
    """
    if spec.gradient_checkpointing:
        backbone.gradient_checkpointing_enable({"use_reentrant": False})
        # With frozen embeddings, checkpointed layers would get no input with a gradient.
        if spec.tuning.method not in ("full", "head"):
            backbone.enable_input_require_grads()
    return add_tuner(backbone, spec.tuning, seed=seed, tokens=tokens)


def offline_schedule(spec: OfflineStage, num_rows: int, seed: int) -> OfflineSchedule:
    """Return the schedule of an offline stage for a number of rows."""
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


@dataclass(frozen=True, slots=True)
class OfflineRows:
    """Tokenized rows of an offline stage, with the findings of loading them.

    Attributes:
        training: rows to train on. heldout: rows for held-out evaluation.
        examples: some of the examples behind the rows, for the preflight.
        checks: lines of the preflight's card. notes: entries of the manifest.
    """

    training: Sequence[Any]
    heldout: Sequence[Any]
    examples: Sequence[Example]
    checks: Sequence[Check]
    notes: Mapping[str, Any]


def offline_rows(
    spec: OfflineStage, context: StageContext, *, render: Callable[[Example], Any]
) -> OfflineRows:
    """Load and tokenize training and held-out rows that share no prompt.

    Args:
        spec: the stage; ``max_length`` and ``max_lost_frac`` bound the dropped rows.
        context: context of the stage.
        render: example -> tokenized row.
    """
    check_loss_options(spec)
    load = partial(load_rows, kind=spec.rows, seed=context.seed, render=render)
    training, heldout = load(spec.data, mix_cap=spec.mix_cap), load(spec.heldout)
    # Shared prompts would make the held-out loss a training loss.
    check_overlap(training.sharing_prompts(heldout.examples), heldout.examples)
    checks, notes = contamination_checks(
        context.recipe, training.examples, heldout.examples, max_frac=spec.max_contaminated_frac
    )
    fitted = partial(
        fit_loaded,
        render=render,
        max_length=spec.max_length,
        max_lost_frac=spec.max_lost_frac,
        ledger=context.ledger,
    )
    # Evenly spaced over both, by place: rows of a store are read one by one.
    both, num = (training.examples, heldout.examples), len(training.examples)
    some = [
        both[0][i] if i < num else both[1][i - num]
        for i in spread(range(sum(map(len, both))), MAX_SEEN)
    ]
    trained, places = fitted(training, what=f"{context.name}: training rows")
    watched, _ = fitted(heldout, what=f"{context.name}: held-out rows")
    if spec.keep.augment is not None and len(trained):
        trained = AugmentedRows(
            trained,
            chosen(training.examples, places),
            render=render,
            spec=spec.keep.augment,
            seed=distributed.derive_seed(context.seed, "augment"),
            max_length=spec.max_length,
        )
    return OfflineRows(trained, watched, some, checks, notes)


def run_offline(
    module: nn.Module,
    task: OfflineTask[Any],
    spec: OfflineStage,
    *,
    context: StageContext,
    stopping: EarlyStopping | None,
    anchor: Anchor | None = None,
    stops: Sequence[int] = (),
    save: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train ``module`` on an offline task and return the last metrics.

    Args:
        module: the model. task: rows, batches and loss. spec: the stage. context: of the stage.
        stopping: the rule that ends it early. anchor: of the old task's weights.
        stops: stop tokens of a policy that learns to respond; their probability is measured then.
        save: writes the trained weights, before the policy is judged by it.
    """
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
    steps = schedule.total_steps
    diagnosis = Diagnosis(spec, total_steps=steps, num_trained=learner.num_trained, rows=task.rows)
    final = train_offline(
        learner,
        task,
        schedule,
        metrics=metrics,
        checkpoints=context.out / "checkpoints",
        stopping=stopping,
        diagnosis=diagnosis,
    )
    if save is not None:
        save()
    # After saving: a model that never stops is kept, and the alarm names it.
    rows = spread(task.heldout or task.rows, NUM_ROWS)
    if stops and (found := stop_probabilities(learner.engine, rows, stops)):
        final["eval/stop_prob"] = median(found)
        diagnosis.conclude(steps, never_stops(found), metrics)
    metrics.close()
    return final


def prepare_policy(
    spec: OfflineStage,
    context: StageContext,
    *,
    data: OfflineRows,
    module: LogprobModel,
    task: OfflineTask[Any],
    source: Artifact,
    chat: ChatFormat,
) -> Prepared:
    """Return an offline stage that is ready to train its policy."""
    checks = offline_checks(
        spec,
        chat=chat,
        source=source,
        module=module,
        model=module.model,
        task=task,
        examples=data.examples,
    )
    return Prepared(
        train=partial(train_policy, spec, module, task, source=source, chat=chat, context=context),
        checks=[*data.checks, *disk_checks(spec, module, context.run_dir / context.name), *checks],
        views=lambda: row_views(task.rows, chat),
        notes=data.notes,
    )


def train_policy(
    spec: OfflineStage,
    module: LogprobModel,
    task: OfflineTask[Any],
    *,
    source: Artifact,
    chat: ChatFormat,
    context: StageContext,
) -> StageResult:
    """Train and save the policy of an offline stage, and return its results."""
    # Measured at the start, before the first step moves the weights.
    anchor = build_anchor(spec, module, chat, context=context)
    write = partial(save_trained_policy, spec, module, source_dir=source.model_dir)
    best = BestWeights(write, context.out)
    stopping = build_stopping(spec, best)
    # Training.
    final = run_offline(
        module,
        task,
        spec,
        context=context,
        stopping=stopping,
        anchor=anchor,
        stops=chat.stop_token_ids if spec.kind == "sft" else (),
        save=partial(write, out=context.out) if stopping is None else None,
    )
    trained, total = num_trained(module.model)
    final |= {"tuning/trained_params": float(trained), "tuning/params": float(total)}
    notes = {}
    if stopping is not None:
        best.restore(stopping.best_step)
        notes = stopping_notes(stopping)
    # Merging an adapter may change the model, so the saved weights are measured again.
    if task.heldout and has_adapter(module.model) and merges(module.model):
        saved = read_back(partial(load_tuned_policy, context.out / "model", dtype=spec.dtype))
        if saved is not None:
            final |= saved_loss(LogprobModel(saved), task, spec.micro_tokens)
            # qlora saves a different policy on purpose; the best weights are not the last ones.
            if spec.tuning.method != "qlora" and stopping is None:
                check_saved_loss(final, dtype=spec.dtype)
    data = fingerprints(spec.data, spec.heldout, replayed(spec))
    return StageResult(final, data, notes, tidy_after(stopping, best))
