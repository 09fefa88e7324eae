"""The recipe that a converter builds: what every tool's configuration has in common."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.core.text import is_hub_id
from align.recipe.foreign.keys import Keys, folder_name
from align.recipe.schema import SinkSpec

FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
POLICY_KINDS = ("dpo", "kto", "ppo", "grpo")
"""Stage kinds with a reference, in which adapters have no dropout."""
DEFAULT_WARMUP = 0.03


@dataclass(slots=True)
class Draft:
    """A recipe of a base and a training stage.

    Attributes:
        keys: the configuration.
        kind: kind of the training stage.
        base: keys of the base stage.
        stage: keys of the training stage.
        recipe: top-level keys.
        files: further files that the recipe needs, by name.
    """

    keys: Keys
    kind: str
    base: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def online(self) -> bool:
        """Return whether the stage samples responses."""
        return self.kind in ("ppo", "grpo")

    def whole(self) -> dict[str, Any]:
        """Return the recipe; its training stage is named by its kind."""
        stages = {
            "base": {"kind": "base", **self.base},
            self.kind: {"kind": self.kind, "init": "base", **self.stage},
        }
        return {"name": self.recipe.pop("name", "imported"), **self.recipe, "stages": stages}


@dataclass(frozen=True, slots=True)
class Names:
    """How a tool names the arguments of transformers' trainer; most tools keep its names."""

    schedule: str = "lr_scheduler_type"
    optimizer: str = "optim"
    epochs: str = "num_train_epochs"
    rows: str = "per_device_train_batch_size"


@dataclass(frozen=True, slots=True)
class Defaults:
    """A tool's own defaults, which are written out where they differ from align's."""

    learning_rate: float
    schedule: str = "linear"
    warmup_frac: float = 0.0
    epochs: float = 3.0
    rows: int = 8


def set_training(draft: Draft, names: Names, defaults: Defaults, *, max_length: int) -> None:
    """Convert length, batch, optimizer, number format, checkpoints and trackers."""
    keys, stage = draft.keys, draft.stage
    stage["max_length"] = max_length
    _set_duration(draft, names, defaults)
    if not draft.online:
        _set_batch(draft, names, defaults, max_length=max_length)
    stage["optim"] = _optimizer_of(draft, names, defaults)
    stage["dtype"] = _dtype_of(keys)
    if keys.flag("gradient_checkpointing"):
        stage["gradient_checkpointing"] = True
    _set_checkpoints(draft)
    _set_sharding(draft)
    if keys.has("seed"):
        draft.recipe["seed"] = int(keys.number("seed"))
    _set_trackers(draft)
    draft.recipe["name"] = folder_name(keys.text("output_dir"), draft.kind)


def _set_duration(draft: Draft, names: Names, defaults: Defaults) -> None:
    """Convert epochs or steps; an online stage counts rollout steps only."""
    keys, stage = draft.keys, draft.stage
    steps = keys.number("max_steps", -1)
    epochs = keys.number(names.epochs, defaults.epochs)
    if steps > 0:
        stage["steps"] = int(steps)
        if keys.has(names.epochs):
            keys.note(names.epochs, "max_steps takes precedence")
        if draft.kind == "grpo":
            keys.note("max_steps", "counted in optimizer steps there and in rollout steps here")
    elif draft.online:
        stage["steps"] = 100
        keys.note(
            names.epochs,
            "an online stage counts rollout steps; 'steps: 100' is a placeholder for rows x epochs "
            "/ prompts_per_step",
            lost=True,
        )
    else:
        stage["epochs"] = float(epochs)


def _set_batch(draft: Draft, names: Names, defaults: Defaults, *, max_length: int) -> None:
    """Convert the rows of one process and the accumulation to the rows of an optimizer step."""
    keys = draft.keys
    rows = keys.count(names.rows, defaults.rows)
    accumulated = keys.count("gradient_accumulation_steps", 1)
    draft.stage["batch_size"] = max(rows * accumulated, 2 if draft.kind == "kto" else 1)
    draft.stage["micro_tokens"] = rows * max_length
    keys.note(
        names.rows,
        f"times the accumulation it is batch_size {rows * accumulated} of one process; with ranks "
        "(GPUs), multiply batch_size by them",
    )
    if draft.kind == "kto" and rows * accumulated < 2:
        keys.note(names.rows, "a kto stage compares at least 2 rows; batch_size is 2", lost=True)


def _optimizer_of(draft: Draft, names: Names, defaults: Defaults) -> dict[str, Any]:
    """Return the block ``optim``."""
    keys = draft.keys
    optim: dict[str, Any] = {
        "learning_rate": keys.number("learning_rate", defaults.learning_rate),
        "schedule": _schedule(keys, names, defaults),
    }
    optim["warmup_frac"] = _warmup(draft, names, defaults)
    inner = keys.mapping("lr_scheduler_kwargs")
    for source, name in ((inner, "min_lr_rate"), (keys, "cosine_min_lr_ratio")):
        if source.has(name):
            optim["min_lr_frac"] = source.number(name)
    inner.report_rest({}, tool="its scheduler")
    if keys.number("weight_decay", 0.0):
        optim["weight_decay"] = keys.number("weight_decay")
    betas = [keys.number("adam_beta1", 0.9), keys.number("adam_beta2", 0.999)]
    if betas != [0.9, 0.999]:
        optim["betas"] = betas
    if keys.has("adam_epsilon"):
        optim["eps"] = keys.number("adam_epsilon")
    if keys.number("max_grad_norm", 1.0) > 0:
        optim["max_grad_norm"] = keys.number("max_grad_norm", 1.0)
    else:
        keys.note("max_grad_norm", "0 clips nothing there; align always clips, at 1.0", lost=True)
    optimizer = keys.text(names.optimizer, "adamw_torch").lower()
    if "adamw" not in optimizer:
        keys.note(names.optimizer, f"'{optimizer}'; align has AdamW only", lost=True)
    elif "8bit" in optimizer or "paged" in optimizer:
        keys.note(
            names.optimizer,
            f"'{optimizer}' keeps its states in 8 bits or paged; here AdamW with float32 states",
        )
    return optim


def _schedule(keys: Keys, names: Names, defaults: Defaults) -> str:
    given = keys.text(names.schedule, defaults.schedule)
    if given not in SCHEDULES:
        keys.note(names.schedule, f"'{given}'; cosine is used instead", lost=True)
    return SCHEDULES.get(given, "cosine")


def _warmup(draft: Draft, names: Names, defaults: Defaults) -> float:
    keys = draft.keys
    ratio, steps = keys.number("warmup_ratio"), keys.number("warmup_steps")
    if keys.data.get(names.schedule) == "constant":  # transformers then ignores both
        return 0.0
    if steps is not None and 0 < steps < 1:
        return float(steps)
    if steps:
        total = keys.number("max_steps", -1)
        if total > 0:
            return min(round(steps / total, 6), 1.0)
        keys.note(
            "warmup_steps",
            f"align has a fraction of all steps, and their number is unknown; warmup_frac is "
            f"{DEFAULT_WARMUP}: write {steps} / steps",
            lost=True,
        )
        return DEFAULT_WARMUP
    if ratio is not None:
        return float(ratio)
    return 0.0 if steps == 0 else defaults.warmup_frac


def _dtype_of(keys: Keys) -> str:
    """Return the number format of the weights."""
    half = keys.flag("fp16") or keys.flag("float16")
    asked = [keys.choice(name) for name in ("bf16", "bfloat16", "pure_bf16")]
    named = keys.text("torch_dtype") or keys.text("dtype")
    if True in asked or "full" in asked or named == "bfloat16":
        if named not in ("", "bfloat16", "auto"):
            name = "torch_dtype" if keys.has("torch_dtype") else "dtype"
            keys.note(
                name, f"'{named}': weights are bfloat16, with float32 copies in the optimizer"
            )
        return "bfloat16"
    if half or named == "float16":
        name = "fp16" if half else "torch_dtype" if keys.has("torch_dtype") else "dtype"
        keys.note(name, "float16 needs loss scaling, which align has not; dtype is auto", lost=True)
        return "auto"
    return "auto" if "auto" in asked or named == "auto" else "float32"


def _set_checkpoints(draft: Draft) -> None:
    """Convert the interval and the number of checkpoints."""
    keys, stage = draft.keys, draft.stage
    strategy, every = keys.choice("save_strategy"), keys.number("save_steps")
    limit = keys.number("save_total_limit")
    if strategy in ("no", False):
        stage["checkpoint_every"] = 0
        for name in ("save_steps", "save_total_limit"):
            if keys.number(name):
                keys.note(name, "no effect with save_strategy no")
        return
    if strategy not in (None, "", "steps"):
        told = f"'{strategy}'; align counts steps: write checkpoint_every: STEPS"
        keys.note("save_strategy", told, lost=True)
    elif every is not None and every >= 1:
        stage["checkpoint_every"] = int(every)
    elif every is not None and every > 0:
        keys.note("save_steps", "a fraction of all steps; write checkpoint_every", lost=True)
    if limit is not None and limit >= 1:
        stage["keep_checkpoints"] = int(limit)
    elif limit is not None:
        keys.note("save_total_limit", "keeps all there; write keep_checkpoints", lost=True)


def _set_sharding(draft: Draft) -> None:
    """Convert DeepSpeed's stage, read from the name of its file, and FSDP to ZeRO."""
    keys = draft.keys
    file = keys.take("deepspeed")
    if isinstance(file, str) and file:
        found = re.search(r"z(?:ero)?_?([0-3])", Path(file).name.lower())
        if found is None:
            keys.note("deepspeed", f"{file}: write its stage in zero.stage", lost=True)
        else:
            zero: dict[str, Any] = {"stage": int(found[1])}
            if "offload" in file.lower() and zero["stage"]:
                zero["offload"] = "cpu"
            draft.stage["zero"] = zero
            keys.note("deepspeed", f"zero.stage {found[1]} by the name of the file")
    elif isinstance(file, dict):
        keys.note("deepspeed", "write its stage in zero.stage", lost=True)
    for name in ("fsdp", "fsdp_config", "fsdp_version"):
        if keys.has(name) and keys.take(name) not in ("", [], {}):
            draft.stage.setdefault("zero", {"stage": 3})
            keys.note(name, "align shards with DeepSpeed: zero.stage 3 shards the same")


def _set_trackers(draft: Draft) -> None:
    """Convert the names of experiment trackers."""
    keys = draft.keys
    known = [name for name, field in SinkSpec.model_fields.items() if field.annotation is bool]
    names = [name for name in keys.texts("report_to") if name not in ("none", "all")]
    names += [name for name in known if keys.flag(f"use_{name}")]
    project = keys.text("wandb_project")
    if project:
        names.append("wandb")
        keys.note("wandb_project", f"the project's name comes from WANDB_PROJECT={project}")
    for name in dict.fromkeys(names):
        if name in known:
            draft.recipe.setdefault("sinks", {})[name] = True
        else:
            keys.note("report_to", f"'{name}'; align has {', '.join(known)}", lost=True)


@dataclass(frozen=True, slots=True)
class Adapter:
    """The names of a tool's adapter keys, and its defaults."""

    rank: str = "lora_r"
    targets: str = "lora_target_modules"
    default_rank: int = 16
    default_alpha: int | None = 32
    """None is twice the rank."""


def adapter_of(draft: Draft, names: Adapter, method: str) -> dict[str, Any]:
    """Return the block ``tuning`` of a LoRA-like method."""
    keys = draft.keys
    rank = keys.count(names.rank, names.default_rank)
    alpha = keys.number("lora_alpha", names.default_alpha or 2 * rank)
    if method == "pissa":
        return {"method": "pissa", "rank": rank, "targets": _targets_of(keys, names)}
    tuning = {"method": method, "rank": rank, "alpha": float(alpha)}
    dropout = keys.number("lora_dropout", 0.0)
    if dropout and draft.kind in POLICY_KINDS:
        keys.note(
            "lora_dropout",
            f"{dropout} would make the policy differ from its reference by chance; it is 0",
            lost=True,
        )
    elif dropout:
        tuning["dropout"] = dropout
    tuning["targets"] = _targets_of(keys, names)
    return tuning


def _targets_of(keys: Keys, names: Adapter) -> str | list[str]:
    """Return the adapted layers."""
    linear = keys.flag("lora_target_linear")
    given = keys.texts(names.targets)
    if linear or given in (["all"], ["all-linear"]):
        if linear and given:
            keys.note(names.targets, "lora_target_linear takes precedence")
        return "all-linear"
    if given:
        return given
    keys.note(names.targets, "not given; targets are peft's for Llama, Mistral and Qwen2")
    return ["q_proj", "v_proj"]


def source_of(
    path: str,
    *,
    split: str = "",
    config: str = "",
    revision: str = "",
    rename: Mapping[str, str] | None = None,
    form: str = "",
) -> dict[str, Any]:
    """Return a data source; of a hub id, the split is part of the name that is read."""
    # A file that is not here has the form of a hub id too.
    if is_hub_id(path) and not path.endswith(FILES) and not Path(path).exists():
        path += f"@{revision}" if revision else ""
        path += f"#{config}" if config else ""
        path += f":{split or 'train'}"
    found: dict[str, Any] = {"path": path}
    if form:
        found["format"] = form
    renamed = {old: new for old, new in (rename or {}).items() if old != new}
    return found | ({"rename": renamed} if renamed else {})


def hold_out(draft: Draft, key: str, frac: float) -> None:
    """Divide the training data by a hash of the prompts, with ``frac`` of them held out."""
    keys, stage = draft.keys, draft.stage
    if not frac:
        return
    if not 0 < frac < 1:
        keys.note(key, f"{frac} rows; align holds out a fraction: heldout_frac", lost=True)
        return
    if draft.online:
        keys.note(key, "an online stage evaluates with 'watch' and scorers of its own", lost=True)
        return
    sources = stage["data"]
    stage["heldout"] = [{**s, "split": "heldout", "heldout_frac": frac} for s in sources]
    stage["data"] = [{**s, "split": "train", "heldout_frac": frac} for s in sources]


def set_evaluation(draft: Draft) -> None:
    """Convert the interval of the evaluation during training."""
    keys, stage = draft.keys, draft.stage
    strategy = keys.text("eval_strategy") or keys.text("evaluation_strategy")
    every = keys.number("eval_steps")
    heldout = bool(stage.get("heldout"))
    if strategy in ("no", "False"):
        if every:
            keys.note("eval_steps", "no effect with eval_strategy no")
    elif heldout and every and every >= 1 and strategy != "epoch":
        stage["eval_every"] = int(every)
    elif heldout and (strategy == "epoch" or (every and every < 1)):
        name = "eval_steps" if every else "eval_strategy"
        keys.note(name, "align counts steps; write eval_every: STEPS", lost=True)
    elif every or strategy:
        for name in ("eval_strategy", "evaluation_strategy", "eval_steps"):
            if keys.has(name):
                keys.note(name, "no held-out rows are given: nothing is evaluated", lost=True)
    patience = keys.number("early_stopping_patience")
    if patience and stage.get("eval_every"):
        stage["keep"] = {"early_stopping": {"patience": int(patience)}}
    elif patience:
        keys.note("early_stopping_patience", "needs heldout rows and eval_every", lost=True)
