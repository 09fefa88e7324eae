"""TRL's trainers: find one by name, build it, and determine where it can resume."""

import importlib
import inspect
import json
import math
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from align.core.distributed import derive_seed
from align.core.errors import RecipeError
from align.models.loading import disable_dropout
from align.recipe.schema import TrlStage
from align.stages.base import StageContext
from align.training.deepspeed import deepspeed_config
from align.tuning.rows import refuse_untrained, untrained_tokens
from align.tuning.wrap import add_tuner
from reward_models.base import RewardFunction
from reward_models.scalar import exact_attention

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
_SERVER = (
    "samples from a separate vLLM server and sends it the weights over NCCL; "
    "kind: grpo samples inside the stage"
)
REFUSED = {
    "Reward": "trains a reward model, but a trl stage writes a policy; use kind: reward",
    "AsyncGRPO": _SERVER,
    "AsyncDistillation": f"{_SERVER}, and Distillation needs no server",
}
"""Trainers that cannot be a stage, with the reason."""
MOVING = (
    "SyncRefModelCallback",
    "SyncTeacherModelCallback",
    "PEFTAdapterEMACallback",
    "BEMACallback",
)
"""TRL callbacks that update a second model together with the policy."""


def find_trainer(name: str) -> tuple[type, type]:
    """Return ``<name>Trainer`` and ``<name>Config`` from TRL or its experimental modules.

    Raises:
        RecipeError: there is no such trainer (with the known names), or it cannot be a stage.
    """
    import trl
    from trl import experimental

    if name in REFUSED:
        raise RecipeError(f"trainer: TRL's {name} {REFUSED[name]}")
    # Names only: importing every experimental module would need their optional packages.
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
    """Load a model as TRL expects it, with dropout off as in every stage."""
    config = AutoConfig.from_pretrained(str(model_dir), trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        str(model_dir),
        dtype=getattr(torch, spec.dtype),
        attn_implementation=exact_attention(config),
        trust_remote_code=False,
    )
    disable_dropout(model)
    return model


def load_trained(model_dir: Path, spec: TrlStage, *, seed: int) -> Any:
    """Load the policy and add the adapter of ``tuning``.

    Raises:
        RecipeError: the adapter would freeze rows of tokens that were never trained.
    """
    model = load_model(model_dir, spec)
    if spec.tuning.method != "full":
        who = f"kind trl with tuning.method {spec.tuning.method}"
        refuse_untrained(untrained_tokens(model, model_dir), model_dir, who)
    return add_tuner(model, spec.tuning, seed=derive_seed(seed, "tuning"))


def configuration(config_class: type, spec: TrlStage, context: StageContext) -> Any:
    """Return the trainer's configuration from the stage's keys and ``args``.

    Raises:
        RecipeError: the class has no such argument, or rejects a value.
    """
    known = set(inspect.signature(config_class).parameters)
    # Check names first: a misspelled argument must not reach TRL as a TypeError.
    own = _own_arguments(spec, context)
    if spec.max_length is not None:
        own["max_length"] = spec.max_length
    strange = sorted((set(spec.args) | ({"max_length"} & set(own))) - known)
    if strange:
        key = strange[0] if strange[0] == "max_length" else f"args.{strange[0]}"
        raise RecipeError(
            f"{key}: {config_class.__name__} has no argument {', '.join(strange)}; "
            f"it has {', '.join(sorted(known))}"
        )
    try:
        return config_class(**own, **spec.args)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"args: {config_class.__name__}: {error}") from error


def _own_arguments(spec: TrlStage, context: StageContext) -> dict[str, Any]:
    optim, saves = spec.optim, "steps" if spec.checkpoint_every else "no"
    # TRL counts micro-batches per process; the recipe names the global batch.
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
        # TRL would remove older ones before the new one is on the disk and hashed.
        "save_total_limit": None,
        "eval_strategy": "steps" if spec.eval_every else "no",
        "eval_steps": spec.eval_every or None,
        "logging_steps": 1,
        # The default replaces a loss that is not finite with the last finite one.
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    if spec.zero.stage or spec.zero.offload != "none":
        found["deepspeed"] = deepspeed_config(spec.zero, optim, dtype=spec.dtype) | {
            "train_micro_batch_size_per_gpu": spec.micro_batch_size,
            "gradient_accumulation_steps": passes,
            # accelerate itself determines where an optimizer step ends.
            "managed_gradient_accumulation": True,
        }
    return found


def extras(
    trainer_class: type,
    spec: TrlStage,
    *,
    model_dir: Path,
    context: StageContext,
    rewards: Sequence[RewardFunction],
) -> dict[str, Any]:
    """Return the arguments for reference, teacher and rewards of trainers that take them.

    Raises:
        RecipeError: the recipe sets one that the trainer does not take, or lacks one it needs.
    """
    # The signature tells what a trainer needs, so new trainers need no entry here.
    takes = set(inspect.signature(trainer_class).parameters)
    keys = {
        "ref_model": ("reference", spec.reference),
        "teacher_model": ("teacher", spec.teacher is not None),
        "reward_funcs": ("rewards", bool(rewards)),
        "eval_dataset": ("heldout", bool(spec.heldout)),
    }
    # What the recipe gives and the trainer does not take would have no effect.
    strange = sorted(name for name, (_, given) in keys.items() if given and name not in takes)
    if strange:
        idle = [keys[name][0] for name in strange]
        raise RecipeError(
            f"{idle[0]}: {trainer_class.__name__} takes no {', '.join(strange)}; remove "
            f"{', '.join(idle)}"
        )
    # Without these two a trainer has nothing to learn from, though its signature has defaults.
    needed = takes & {"teacher_model", "reward_funcs"}
    missing = sorted(keys[name][0] for name in needed if not keys[name][1])
    if missing:
        raise RecipeError(
            f"trainer: {trainer_class.__name__} learns from {' and '.join(missing)}; give "
            f"{' and '.join(missing)} (see docs/data-stages.md)"
        )
    wanted: dict[str, Any] = {}
    if spec.reference:
        wanted["ref_model"] = load_model(model_dir, spec)
    if spec.teacher is not None:
        wanted["teacher_model"] = load_model(
            context.artifact(spec.teacher, "policy").model_dir, spec
        )
    if rewards:
        wanted["reward_funcs"] = [_function(r) for r in rewards]
    return wanted


def _function(reward: RewardFunction) -> Callable[..., list[float | None]]:
    """Return a reward as a function with the name that TRL logs."""

    def score(
        *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        # TRL also passes its own state and callbacks, which are not columns of the rows.
        listed = {k: v for k, v in columns.items() if isinstance(v, list)}
        return reward(prompts=prompts, completions=completions, **listed)

    score.__name__ = reward.name
    return score


def build_trainer(trainer_class: type, *, where: str, **arguments: object) -> Any:
    """Build a trainer, turning TRL's complaints about data or arguments into recipe errors.

    Raises:
        RecipeError: the message of TRL.
    """
    try:
        trainer = trainer_class(**arguments)
    except (TypeError, ValueError, KeyError, ImportError) as error:
        said = f"{type(error).__name__}: {error}"
        raise RecipeError(
            f"{where}: {trainer_class.__name__} refuses its data or arguments: {said}. Check "
            "'rows' and 'args'"
        ) from error
    if "ref" in getattr(trainer.model, "peft_config", ()):
        # A copy of the new adapter, which a resumed trainer would overwrite with the trained one.
        # Without it the reference is the model with the adapter off, which is the same model.
        trainer.model.delete_adapter("ref")
    return trainer


def _unresumable(trainer: Trainer) -> str | None:
    """Return why a trainer cannot resume from a checkpoint, or None if it can."""
    if type(trainer).__name__ == "IWOPDTrainer":
        return "it starts again at its first batch"
    if any(type(c).__name__ in MOVING for c in trainer.callback_handler.callbacks):
        return (
            "its checkpoints lack the second model that is updated with the policy "
            "(teacher_model_kind: ema, sync_ref_model)"
        )
    return None


def resume_period(trainer: Trainer) -> int:
    """Return after how many optimizer steps, and multiples of them, training can resume.

    Responses that are used for several steps (``steps_per_generation``, ``num_iterations``) are not
    in a checkpoint, so training can only resume where new ones are sampled.

    Returns:
        1 for most trainers; 0 (never) if ``_unresumable`` has a reason.
    """
    if _unresumable(trainer):
        return 0
    args, passes = vars(trainer.args), trainer.args.gradient_accumulation_steps
    # One generation serves this many micro-batches; a step ends after `passes` of them.
    uses = (args.get("steps_per_generation") or 1) * args.get("num_iterations", 1)
    return math.lcm(uses, passes) // passes


def check_resumable(spec: TrlStage, trainer: Trainer) -> None:
    """Check that the stage would resume identically from its checkpoints.

    Raises:
        RecipeError: ``checkpoint_every`` is not a multiple of the period.
    """
    reason, period = _unresumable(trainer), resume_period(trainer)
    if spec.checkpoint_every and reason:
        raise RecipeError(
            f"checkpoint_every: TRL's {spec.trainer} cannot resume exactly: {reason}. Remove "
            "it; an interrupted stage then starts over"
        )
    if spec.checkpoint_every and spec.checkpoint_every % period:
        raise RecipeError(
            f"checkpoint_every: found {spec.checkpoint_every}, but responses are used for "
            f"{period} steps and are not in a checkpoint. Use a multiple of {period}"
        )


def restore_counts(trainer: Any, checkpoint: Path) -> None:
    """Restore the token count, which TRL keeps only in its log lines."""
    if hasattr(trainer, "_total_train_tokens"):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        counts = [int(line["num_tokens"]) for line in state["log_history"] if "num_tokens" in line]
        trainer._total_train_tokens = max(counts, default=0)
