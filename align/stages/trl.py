"""Stage trl: any trainer of TRL with this suite's data, artefacts, metrics and resumption.

The trainer's own code does the training: what it normalises by and how exactly it resumes is
TRL's. What it gets is what every stage gets: checked rows, a verified policy, and checkpoints
that are hashed when they are written and verified before they are loaded.
"""

import importlib
import inspect
import logging
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.core import distributed
from align.core.artefacts import hash_tree, write_json_atomic
from align.core.checkpoints import damage
from align.core.errors import Preempted, RecipeError, TrainingError
from align.core.log import MetricsLog
from align.core.signals import stop_requested
from align.core.types import Example, TokenRow
from align.data.chat import ChatFormat
from align.data.load import check_overlap, fit_rows, load_examples
from align.models.loading import disable_dropout, load_tokenizer, save_policy
from align.recipe.deepspeed import deepspeed_config
from align.recipe.schema import DataSpec, TrlStage
from align.stages.base import StageContext, StageResult, chat_format
from align.stages.contaminated import note_contamination
from align.stages.online import build_rewards
from align.stages.training import fingerprints
from align.stages.trl_preflight import preflight_trl
from reward_models.base import RewardFunction

log = logging.getLogger(__name__)
HASHES = "hashes.json"
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def run(spec: TrlStage, context: StageContext) -> StageResult:
    """Train ``spec.init`` with the trainer of TRL that the recipe names."""
    source = context.artefact(spec.init, "policy")
    trainer_class, config_class = find_trainer(spec.trainer)
    chat = chat_format(source.model_dir)
    args = configuration(config_class, spec, context)
    limit = getattr(args, "max_length", None)  # by default it cuts without a word
    train, heldout = (
        fitting(data, spec, context, chat=chat, limit=limit) for data in (spec.data, spec.heldout)
    )
    check_overlap(train, heldout)
    note_contamination(context, train, heldout, max_frac=spec.max_contaminated_frac)
    rewards = build_rewards(spec.rewards, context)
    metrics = context.metrics(spec.steps)
    trainer = trainer_class(
        model=load_model(source.model_dir, spec),
        args=args,
        train_dataset=to_dataset(train, spec),
        eval_dataset=to_dataset(heldout, spec) if heldout else None,
        processing_class=load_tokenizer(source.model_dir),
        callbacks=[Watcher(metrics, context.out / "checkpoints")],
        **extras(trainer_class, spec, source.model_dir, context, rewards),
    )
    preflight_trl(
        spec, context, trainer=trainer, examples=train, chat=chat, source=source, rewards=rewards
    )
    newest = newest_verified(context.out / "checkpoints")
    if newest is not None:
        metrics.rewind(int(newest.name.split("-")[1]))
        log.info("resumed from %s", newest)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    done = trainer.state.global_step
    if done < spec.steps:
        raise Preempted(f"stopped on a signal after step {done}; run again to go on from there")
    final = {key: float(value) for key, value in named(last_logs(trainer)).items()}
    if heldout:
        found = named(trainer.evaluate())
        metrics.log(done, found)
        final |= found
    metrics.close()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    # Under ZeRO-3 transformers would partition every model that is made from here on, and wait
    # for all ranks: what one rank makes to check the names would hang.
    unset_hf_deepspeed_config()
    if distributed.rank() == 0:
        tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
        save_policy(
            tensors, source_dir=source.model_dir, directory=context.out / "model", dtype=spec.dtype
        )
    return StageResult(final, fingerprints(spec.data, spec.heldout))


def fitting(
    data: Sequence[DataSpec],
    spec: TrlStage,
    context: StageContext,
    *,
    chat: ChatFormat,
    limit: int | None,
) -> list[Example]:
    """Load and render every row as training would, so that faults show; lose those too long.

    TRL cuts long rows without a word; here they are counted and bounded as in every stage.
    """
    examples = load_examples(data, kind=spec.rows, seed=context.seed)
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
    whole = {id(row) for row in kept}
    return [e for e, row in zip(examples, rows, strict=True) if id(row) in whole]


def _longest(example: Example, spec: TrlStage, chat: ChatFormat) -> TokenRow:
    if spec.rows == "prompts":
        ids = chat.prompt_row(example).input_ids
        return TokenRow(ids, (False,) * len(ids), example.source)
    if spec.rows == "preference":
        pair = chat.pair_row(example)
        return max((pair.chosen, pair.rejected), key=lambda row: len(row.input_ids))
    return chat.sft_row(example)


def find_trainer(name: str) -> tuple[type, type]:
    """Find ``<name>Trainer`` and ``<name>Config`` in TRL or in one of its experimental modules.

    Raises:
        RecipeError: there is no such trainer; the names that there are.
    """
    import trl
    from trl import experimental

    modules = [m.name for m in pkgutil.iter_modules(experimental.__path__) if m.ispkg]
    if hasattr(trl, f"{name}Trainer"):
        return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    for module in modules:
        if module.replace("_", "") == name.lower():
            found = importlib.import_module(f"trl.experimental.{module}")
            if hasattr(found, f"{name}Trainer"):
                return getattr(found, f"{name}Trainer"), getattr(found, f"{name}Config")
            names = [n.removesuffix("Trainer") for n in dir(found) if n.endswith("Trainer")]
            raise RecipeError(f"trainer: '{name}'; did you mean {' or '.join(names)}?")
    stable = sorted(n.removesuffix("Trainer") for n in dir(trl) if n.endswith("Trainer"))
    raise RecipeError(
        f"trainer: TRL {trl.__version__} has no {name}Trainer; stable ones are "
        f"{', '.join(stable)}; experimental modules are {', '.join(sorted(modules))}"
    )


def load_model(model_dir: Path, spec: TrlStage) -> Any:
    """Load the policy as TRL expects it; dropout stays off as in every stage."""
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=getattr(torch, spec.dtype))
    disable_dropout(model)
    return model


def configuration(config_class: type, spec: TrlStage, context: StageContext) -> Any:
    """Build the trainer's configuration from the stage's keys and ``args``.

    Raises:
        RecipeError: the class has no such argument, or refuses a value.
    """
    known = set(inspect.signature(config_class).parameters)
    own = _own_arguments(spec, context)
    if spec.max_length is not None:
        own["max_length"] = spec.max_length
    strange = sorted((set(spec.args) | ({"max_length"} & set(own))) - known)
    if strange:
        raise RecipeError(
            f"{context.name}: {config_class.__name__} has no argument {', '.join(strange)}; "
            f"it has {', '.join(sorted(known))}"
        )
    try:
        return config_class(**own, **spec.args)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{context.name}: {config_class.__name__}: {error}") from error


def _own_arguments(spec: TrlStage, context: StageContext) -> dict[str, Any]:
    optim, saves = spec.optim, "steps" if spec.checkpoint_every else "no"
    passes = spec.batch_size // (spec.micro_batch_size * spec.ranks)
    found = {
        "output_dir": str(context.out / "checkpoints"),
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": SCHEDULES[optim.schedule],
        "warmup_steps": round(optim.warmup_frac * spec.steps),
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "max_grad_norm": optim.max_grad_norm,
        "max_steps": spec.steps,
        "per_device_train_batch_size": spec.micro_batch_size,
        "per_device_eval_batch_size": spec.micro_batch_size,
        "gradient_accumulation_steps": passes,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "seed": context.seed,
        "bf16": spec.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": saves,
        "save_steps": spec.checkpoint_every or 500,
        "save_total_limit": spec.keep_checkpoints,
        "eval_strategy": "steps" if spec.eval_every else "no",
        "eval_steps": spec.eval_every or None,
        "logging_steps": 1,
        # The default shows the last finite loss in place of one that is not.
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    if spec.zero.stage or spec.zero.offload != "none":
        found["deepspeed"] = deepspeed_config(spec.zero, optim, dtype=spec.dtype) | {
            "train_micro_batch_size_per_gpu": spec.micro_batch_size,
            "gradient_accumulation_steps": passes,
            # accelerate says itself where an optimiser step ends.
            "managed_gradient_accumulation": True,
        }
    return found


def extras(
    trainer_class: type,
    spec: TrlStage,
    model_dir: Path,
    context: StageContext,
    rewards: Sequence[RewardFunction],
) -> dict[str, Any]:
    """Give reference and rewards to trainers that take them.

    Raises:
        RecipeError: the recipe names one that the trainer does not take.
    """
    takes = set(inspect.signature(trainer_class).parameters)
    wanted: dict[str, Any] = {}
    if spec.reference:
        wanted["ref_model"] = load_model(model_dir, spec)
    if rewards:
        wanted["reward_funcs"] = [_function(r) for r in rewards]
    strange = sorted(set(wanted) - takes)
    if strange:
        keys = {"ref_model": "reference", "reward_funcs": "rewards"}
        raise RecipeError(
            f"{context.name}: {trainer_class.__name__} takes no {', '.join(strange)}; remove "
            f"{', '.join(keys[name] for name in strange)}"
        )
    return wanted


def _function(reward: RewardFunction) -> Callable[..., list[float | None]]:
    """Give a reward the name that TRL shows; the calling convention is the same."""

    def score(*, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        listed = {k: v for k, v in columns.items() if isinstance(v, list)}
        return reward(prompts=prompts, completions=completions, **listed)

    score.__name__ = reward.name
    return score


def to_dataset(examples: Sequence[Example], spec: TrlStage) -> Any:
    """Write examples in the format that TRL names after their kind; prompts keep their columns."""
    from datasets import Dataset

    return Dataset.from_list([_row(example, spec) for example in examples])


def _row(example: Example, spec: TrlStage) -> dict[str, Any]:
    if spec.rows == "prompts":
        return {**example.columns, "prompt": example.prompt}
    if spec.rows == "preference":
        sides = {"chosen": example.completion, "rejected": example.rejected}
        return {"prompt": example.prompt, **sides}
    if spec.rows == "unpaired":
        answer = {"completion": example.completion, "label": example.label}
        return {"prompt": example.prompt, **answer}
    if not example.prompt:
        return {"messages": example.completion}
    return {"prompt": example.prompt, "completion": example.completion}


class Watcher(TrainerCallback):
    """Mirror TRL's log lines to metrics.jsonl, hash its checkpoints, and stop when asked to."""

    def __init__(self, metrics: MetricsLog, checkpoints: Path) -> None:
        self.metrics, self.checkpoints = metrics, checkpoints

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write one line; a loss that is not finite stops the stage."""
        found = named(logs or {})
        loss = found.get("train/loss", 0.0)
        if not math.isfinite(loss):
            raise TrainingError(
                f"optimiser step {state.global_step}: the loss is {loss}, expected a finite "
                "number; nothing of this step is saved. Lower the learning rate"
            )
        if "train/train_runtime" not in found and found:
            self.metrics.log(state.global_step, found)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hash what was saved; the hashes are written last."""
        distributed.barrier()
        if distributed.rank() == 0:
            folder = self.checkpoints / f"checkpoint-{state.global_step}"
            write_json_atomic(folder / HASHES, {"files": hash_tree(folder)})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop after this step where a signal asked for it."""
        if stop_requested():
            control.should_save = control.should_training_stop = True


def named(logs: Mapping[str, Any]) -> dict[str, float]:
    """Bring TRL's names into the form group/name."""
    moved = {"grad_norm": "optim/grad_norm", "learning_rate": "optim/learning_rate"}
    found: dict[str, float] = {}
    for key, value in logs.items():
        if isinstance(value, int | float) and key not in ("epoch", "total_flos"):
            name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            found[moved.get(key, name)] = float(value)
    return found


def last_logs(trainer: Any) -> dict[str, Any]:
    """Give TRL's last log line of a training step."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {k: v for k, v in (lines[-1] if lines else {}).items() if k != "step"}


def newest_verified(checkpoints: Path) -> Path | None:
    """Find the newest checkpoint whose every file has its recorded hash; name damaged ones."""
    found = None
    if distributed.rank() == 0:
        folders = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1]))
        for folder in folders:
            problem = damage(folder, record=HASHES)
            if problem is None:
                found = folder
                break
            log.warning("%s: damaged (%s); trying the one before it", folder, problem)
    return distributed.broadcast_object(found)
