"""Stage trl: any trainer of TRL with this suite's data, artifacts, metrics and resumption.

TRL's code does the training, so loss normalization and the exactness of resuming are TRL's. As in
every stage, rows are checked, the policy is verified, and checkpoints are hashed when they are
written and verified before they are loaded.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.core import distributed
from align.core.artifacts import Artifact
from align.core.checkpoints import damage, save_weights
from align.core.distributed import stop_deferred, stop_requested
from align.core.errors import DataError, Preempted, TrainingError
from align.core.log import MetricsLog
from align.core.types import Example, TokenRow
from align.data.fit import fit_rows
from align.data.load import check_overlap, fingerprints, load_examples
from align.data.render.chat import ChatFormat
from align.data.render.content import check_plain
from align.models.loading import load_tokenizer
from align.models.saving import save_policy
from align.preflight.contamination import contamination_checks
from align.recipe.schema import DataSpec, TrlStage
from align.stages.base import Prepared, StageContext, StageResult, chat_format
from align.stages.rollouts import build_rewards
from align.stages.saving import whole_state
from align.stages.trl.preflight import preflight_trl
from align.stages.trl.saving import HASHES, complete, in_order, save_patiently
from align.stages.trl.trainers import (
    build_trainer,
    check_resumable,
    configuration,
    extras,
    find_trainer,
    load_trained,
    restore_counts,
    resume_period,
)
from align.tuning.files import num_trained, save_adapter
from align.tuning.merging import has_adapter

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)
CONVERSING = ("GKD", "GOLD", "IWOPD")
"""Trainers that read whole conversations from a column ``messages``."""


def prepare(spec: TrlStage, context: StageContext) -> Prepared:
    """Build the recipe's TRL trainer with the policy ``spec.init`` and the rows."""
    source = context.artifact(spec.init, "policy")
    trainer_class, config_class = find_trainer(spec.trainer)
    chat = chat_format(source.model_dir)
    args = configuration(config_class, spec, context)
    limit = getattr(args, "max_length", None)  # by default TRL truncates silently
    train, heldout = (
        fitting(data, spec, context, chat=chat, limit=limit) for data in (spec.data, spec.heldout)
    )
    check_overlap(train, heldout)
    contamination, notes = contamination_checks(
        context.recipe, train, heldout, max_frac=spec.max_contaminated_frac
    )
    rewards = build_rewards(spec.rewards, context)
    given = extras(
        trainer_class, spec, model_dir=source.model_dir, context=context, rewards=rewards
    )
    if heldout:
        given["eval_dataset"] = to_dataset(heldout, spec)
    trainer = build_trainer(
        trainer_class,
        where=context.name,
        model=load_trained(source.model_dir, spec, seed=context.seed),
        args=args,
        train_dataset=to_dataset(train, spec),
        processing_class=load_tokenizer(source.model_dir),
        **given,
    )
    # TRL appends the stop token to text that a template has already ended.
    trainer.train_dataset = end_once(trainer.train_dataset, chat)
    if heldout:
        trainer.eval_dataset = end_once(trainer.eval_dataset, chat)
    check_resumable(spec, trainer)
    checks, views = preflight_trl(
        spec, trainer=trainer, examples=train, chat=chat, source=source, rewards=rewards
    )
    evaluated = bool(heldout)
    return Prepared(
        train=partial(_train_and_save, spec, context, trainer, source=source, evaluated=evaluated),
        checks=[*contamination, *checks],
        views=views,
        notes=notes,
    )


def _train_and_save(
    spec: TrlStage, context: StageContext, trainer: Any, *, source: Artifact, evaluated: bool
) -> StageResult:
    """Train with a TRL trainer and save the model like every stage does."""
    final = trained(trainer, spec, context, evaluated=evaluated)
    trained_params, total = num_trained(trainer.model)
    final |= {"tuning/trained_params": float(trained_params), "tuning/params": float(total)}
    save(spec, context, trainer=trainer, source=source)
    return StageResult(final, fingerprints(spec.data, spec.heldout))


def trained(
    trainer: Trainer, spec: TrlStage, context: StageContext, *, evaluated: bool
) -> dict[str, float]:
    """Train to the end, from the newest checkpoint if there is one, and return the last metrics.

    Raises:
        Preempted: a signal stopped the training.
    """
    metrics, period = context.metrics(spec.steps), resume_period(trainer)
    checkpoints = context.out / "checkpoints"
    trainer.add_callback(Watcher(metrics, checkpoints, period=period, keep=spec.keep_checkpoints))
    save_patiently(trainer, checkpoints)
    # Resume only from a checkpoint whose hashes match.
    newest = _newest_verified(checkpoints)
    if newest is not None:
        metrics.rewind(int(newest.name.split("-")[1]))
        restore_counts(trainer, newest)
        log.info("resumed from %s", newest)
    with stop_deferred():
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    # The callback stops the trainer early after a signal.
    done = trainer.state.global_step
    if done < spec.steps:
        whence = "to resume" if period else "to start over: this trainer cannot be resumed"
        raise Preempted(f"stopped by a signal after step {done}. Run again {whence}")
    final = {key: float(value) for key, value in named(_last_logs(trainer)).items()}
    if evaluated:
        found = named(trainer.evaluate())
        metrics.log(done, found)
        final |= found
    metrics.close()
    return final


def save(spec: TrlStage, context: StageContext, *, trainer: Any, source: Artifact) -> None:
    """Write model/ and, with an adapter, adapter/; every rank must call this."""
    if has_adapter(trainer.model):
        tensors, adapter = whole_state(trainer.model, source.model_dir)
    else:
        # A collective call under ZeRO-3; ranks other than 0 may get nothing.
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
        tensors, adapter = {name: tensor.detach().cpu() for name, tensor in state.items()}, None
    # Under ZeRO-3 transformers would partition every new model and wait for all ranks: the model
    # that one rank creates to check the names would hang.
    unset_hf_deepspeed_config()

    def write() -> None:
        model_dir = context.out / "model"
        save_policy(
            tensors.items(), source_dir=source.model_dir, directory=model_dir, dtype=spec.dtype
        )
        if adapter is not None:
            save_adapter(*adapter, context.out / "adapter")

    save_weights(write, tensors, context.out)


def fitting(
    data: Sequence[DataSpec],
    spec: TrlStage,
    context: StageContext,
    *,
    chat: ChatFormat,
    limit: int | None,
) -> list[Example]:
    """Render every row as training would, to find invalid ones, and drop rows that are too long.

    TRL truncates long rows silently; here they are counted and bounded as in every stage.
    """
    examples = load_examples(data, kind=spec.rows, seed=context.seed)
    for example in examples:
        check_plain(example, reader="kind: trl")
        if spec.rows != "prompts" and _is_weighed(example):
            raise DataError(
                f"{example.source}: the weight of the row or of a turn has no effect: TRL trains "
                "every turn alike. Use kind: sft, or remove the weight"
            )
    unsure = [e.source for e in examples if e.label_prob != 1.0 and spec.rows != "prompts"]
    if unsure:
        raise DataError(
            f"{context.name}: label_prob of {len(unsure)} rows has no effect: TRL treats labels as "
            f"certain ({unsure[0]}). Use sft, reward or dpo, or rename: {{label_prob: was}}"
        )
    rows = [_longest(example, spec, chat) for example in examples]
    if not rows or limit is None:
        return examples
    kept, _ = fit_rows(
        rows,
        max_length=limit,
        max_lost_frac=spec.max_lost_frac,
        what=f"{context.name}: rows",
        ledger=context.ledger,
    )
    # fit_rows keeps the row objects, so identity leads back to the examples.
    whole = {id(row) for row in kept}
    return [e for e, row in zip(examples, rows, strict=True) if id(row) in whole]


def _is_weighed(example: Example) -> bool:
    sides = (example.prompt, example.completion, example.rejected)
    turns = [turn for side in sides if side and not isinstance(side, str) for turn in side]
    return example.weight != 1.0 or any("weight" in turn for turn in turns)


def _longest(example: Example, spec: TrlStage, chat: ChatFormat) -> TokenRow:
    if spec.rows == "prompts":
        ids = chat.prompt_row(example).input_ids
        return TokenRow(ids, (False,) * len(ids), example.source)
    if spec.rows == "preference":
        pair = chat.pair_row(example)
        return max((pair.chosen, pair.rejected), key=lambda row: len(row.input_ids))
    return chat.sft_row(example)


def to_dataset(examples: Sequence[Example], spec: TrlStage) -> Any:
    """Return examples as a dataset in TRL's format of their kind; prompts keep their columns."""
    from datasets import Dataset

    rows = [_row(example, spec) for example in examples]
    first = next((name for name in ("prompt", "messages", "text") if name in rows[0]), "")
    for example, row in zip(examples, rows, strict=True):
        if first not in row:
            raise DataError(
                f"{example.source}: a row without '{first}', but {examples[0].source} has it. TRL "
                "reads all rows alike: use messages, or prompt and completion, for every row"
            )
    # By columns: from_list keeps only the fields of the first row.
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _row(example: Example, spec: TrlStage) -> dict[str, Any]:
    if spec.trainer in CONVERSING:
        return {"messages": _conversation(example, spec.trainer)}
    if spec.rows == "prompts":
        return {**example.columns, "prompt": example.prompt}
    further = {name: _column(example, name) for name in spec.columns}
    if spec.rows == "preference":
        sides = {"chosen": example.completion, "rejected": example.rejected}
        return {**further, "prompt": example.prompt, **sides}
    if spec.rows == "unpaired":
        answer = {"completion": example.completion, "label": example.label}
        return {**further, "prompt": example.prompt, **answer}
    if not example.prompt:
        whole = "text" if isinstance(example.completion, str) else "messages"
        return {**further, whole: example.completion}
    return {**further, "prompt": example.prompt, "completion": example.completion}


def _conversation(example: Example, trainer: str) -> list[Any]:
    said = [example.prompt or [], example.completion or []]
    if any(isinstance(part, str) for part in said):
        raise DataError(
            f"{example.source}: plain text, but TRL's {trainer} reads conversations. Provide "
            "prompt and completion as messages with role and content"
        )
    return [turn for part in said for turn in part]


def _column(example: Example, name: str) -> Any:
    if name not in example.columns:
        raise DataError(
            f"{example.source}: no column '{name}', which 'columns' names; the row has "
            f"{', '.join(sorted(example.columns)) or 'no extra columns'}"
        )
    return example.columns[name]


def end_once(rows: "Dataset", chat: ChatFormat) -> Any:
    """Remove the second stop token of pairs that TRL's ORPO and CPO tokenize.

    They add a stop token if the last token is not one. With a template that writes a line break
    after its own stop, the model would learn to stop twice. Rows end after the first stop here.
    """
    sides = [s for s in ("chosen", "rejected") if f"{s}_labels" in (rows.column_names or ())]

    def cut(row: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for side in sides:
            end = _first_end(row[f"{side}_input_ids"], chat)
            for key in ("input_ids", "attention_mask", "labels"):
                found[f"{side}_{key}"] = row[f"{side}_{key}"][:end]
        return found

    return rows.map(cut) if sides else rows


def _first_end(ids: Sequence[int], chat: ChatFormat) -> int:
    end = len(ids) - 1
    if end < 1 or ids[end] not in chat.stop_token_ids:
        return len(ids)
    while end > 1 and ids[end - 1] not in chat.stop_token_ids:
        if chat.decode(ids[end - 1 : end]).strip():
            return len(ids)
        end -= 1
    return end if ids[end - 1] in chat.stop_token_ids else len(ids)


class Watcher(TrainerCallback):
    """Callback that writes metrics.jsonl, hashes TRL's checkpoints, and stops on a signal."""

    def __init__(self, metrics: MetricsLog, checkpoints: Path, *, period: int, keep: int) -> None:
        self.metrics, self.checkpoints, self.period, self.keep = metrics, checkpoints, period, keep

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        """Write one line of metrics; raise TrainingError if the loss is not finite."""
        found = named(logs or {})
        loss = found.get("train/loss", 0.0)
        if not math.isfinite(loss):
            raise TrainingError(
                f"optimizer step {state.global_step}: the loss is {loss}, expected a finite "
                "number; this step was not saved. Lower the learning rate"
            )
        if "train/train_runtime" not in found and found:
            self.metrics.log(state.global_step, found)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Hash the saved checkpoint, and remove older ones."""
        distributed.barrier()
        if distributed.rank() == 0:
            complete(self.checkpoints, state.global_step, self.keep)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Save and stop after a signal, at the next step that training can resume from."""
        if stop_requested() and not (self.period and state.global_step % self.period):
            control.should_training_stop = True
            control.should_save = self.period > 0


def named(logs: Mapping[str, Any]) -> dict[str, float]:
    """Return TRL's metrics with names of the form group/name."""
    moved = {"grad_norm": "optim/grad_norm", "learning_rate": "optim/learning_rate"}
    found: dict[str, float] = {}
    for key, value in logs.items():
        if isinstance(value, int | float) and key not in ("epoch", "total_flos"):
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            found[moved.get(key, name)] = float(value)
    return found


def _last_logs(trainer: Trainer) -> dict[str, Any]:
    """Return TRL's last log line of a training step."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {k: v for k, v in (lines[-1] if lines else {}).items() if k != "step"}


def _newest_verified(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint whose files match their hashes; warn about damaged ones."""
    found = None
    if distributed.rank() == 0:
        for folder in reversed(in_order(checkpoints)):
            problem = damage(folder, record=HASHES)
            if problem is None:
                found = folder
                break
            log.warning("%s: %s; trying the one before it", folder, problem)
    return distributed.broadcast_object(found)
