"""Convert a configuration of TRL's command line (also alignment-handbook's and open-r1's)."""

from typing import Any

from align.recipe.algorithms import PAIR_LOSSES
from align.recipe.foreign.draft import (
    Adapter,
    Defaults,
    Draft,
    Names,
    adapter_of,
    hold_out,
    set_evaluation,
    set_training,
    source_of,
)
from align.recipe.foreign.keys import Keys
from align.recipe.foreign.online import rewards_of, set_grpo

TOOL = "TRL"
KINDS = ("sft", "dpo", "orpo", "kto", "reward", "grpo", "rloo", "ppo")
STAGES = {"orpo": "dpo", "rloo": "grpo"}
"""Kinds of stages that are not named like their trainer."""
RATES = {"sft": 2e-5, "reward": 1e-4, "ppo": 3e-6}
"""TRL's default learning rates; 1e-6 for all others."""

EQUIVALENTS = {
    "model_name_or_path": "`stages.base.path`",
    "chat_template, chat_template_path, pad_token, eos_token": "`stages.base.tokenizer`",
    "torch_dtype, dtype, bf16, fp16": "`dtype`",
    "use_peft, load_in_4bit, lora_*, use_dora, use_rslora": "`tuning`",
    "dataset_name, dataset_config, dataset_train_split, dataset_test_split, datasets, "
    "dataset_mixer, dataset_splits, dataset_mixture": "`data`, `heldout`, `prompts`",
    "dataset_text_field, dataset_prompt_column": "`rename`",
    "max_length, max_seq_length": "`max_length`",
    "per_device_train_batch_size, gradient_accumulation_steps": "`batch_size`, `micro_tokens`",
    "num_train_epochs, max_steps": "`epochs`, `steps`",
    "learning_rate, lr_scheduler_*, warmup_*, weight_decay, adam_*, max_grad_norm, optim": (
        "`optim`"
    ),
    "save_strategy, save_steps, save_total_limit": "`checkpoint_every`, `keep_checkpoints`",
    "eval_strategy, eval_steps": "`eval_every`",
    "deepspeed, fsdp": "`zero`",
    "report_to, seed, output_dir": "`sinks`, `seed`, `name`",
    "beta, loss_type, label_smoothing, ld_alpha, rpo_alpha, simpo_gamma": (
        "the same keys in dpo; rpo_alpha becomes `nll_coef`, simpo_gamma becomes `gamma`"
    ),
    "desirable_weight, undesirable_weight": "the same keys in kto",
    "center_rewards_coefficient": "`center_coef` in reward",
    "num_generations, generation_batch_size, steps_per_generation, num_iterations": (
        "`group_size`, `prompts_per_step`, `minibatches`, `update_epochs`"
    ),
    "epsilon, epsilon_high, delta, loss_type, scale_rewards, importance_sampling_level": (
        "`clip`, `aggregation`, `objective`, `scale`, `algorithm: gspo`"
    ),
    "max_completion_length, max_prompt_length, temperature, use_vllm": "`sampling`, `max_length`",
    "mask_truncated_completions": "`truncation: mask`",
    "reward_funcs, reward_weights": (
        "`rewards`: accuracy becomes math, format becomes format, TRL's other functions and "
        "`module.function` become python"
    ),
    "sft_model_path, reward_model_path, kl_coef, cliprange, gamma, lam, num_ppo_epochs, "
    "num_mini_batches, response_length": "the keys of ppo (TRL before 1.0)",
}
_KERNEL = "- selects a kernel; the result is the same"
_WHERE = "- the engine runs inside the stage; its settings are in 'sampling'"
REASONS = {
    "model_revision": (
        "a base stage loads the newest revision; to use another one, download it and name its "
        "folder"
    ),
    "model_init_kwargs": "set the corresponding keys in the base stage",
    "trust_remote_code": "align never runs a model's own Python code",
    "attn_implementation": "- align chooses the attention kernel; the result is the same",
    "use_flash_attention_2": "- align chooses the attention kernel; the result is the same",
    "load_in_8bit": "align has no 8-bit weights; they keep their dtype (tuning.method: qlora has "
    "4 bits)",
    "load_in_4bit": "supported only with use_peft",
    "bnb_4bit_*": "- qlora uses doubly quantized NF4",
    "use_bnb_nested_quant": "- qlora uses doubly quantized NF4",
    "lora_modules_to_save": (
        "align does not fully train embeddings and head together with an adapter"
    ),
    "lora_task_type": "- the kind of the stage determines it",
    "packing": "- rows are packed without padding in every stage",
    "packing_strategy": "- rows are packed without padding in every stage",
    "eval_packing": "- rows are packed without padding in every stage",
    "padding_free": "- rows are packed without padding in every stage",
    "pad_to_multiple_of": "- rows are packed without padding in every stage",
    "assistant_only_loss": "- sft trains on the assistant turns",
    "completion_only_loss": "- sft trains on the response",
    "dataset_kwargs": "- the chat template alone determines the special tokens",
    "dataset_num_proc": "- align chooses the number of worker processes",
    "preprocessing_num_workers": "- align chooses the number of worker processes",
    "num_processes": "write ranks in the stage",
    "dataset_streaming": "align always reads files completely",
    "shuffle_dataset": "- rows are shuffled in every epoch",
    "train_sampling_strategy": "- rows are shuffled in every epoch",
    "truncation_mode": (
        "align drops and counts rows longer than max_length; it cuts only the prompts of pairs"
    ),
    "max_prompt_length": (
        "align drops and counts rows longer than max_length; it cuts only the prompts of pairs"
    ),
    "max_completion_length": (
        "align drops and counts rows longer than max_length; it cuts only the prompts of pairs"
    ),
    "system_prompt": "align adds no system turn; put it into the rows or the chat template",
    "precompute_ref_*": (
        "- align always computes the reference's log-probabilities before the first step"
    ),
    "disable_dropout": "- dropout is off unless keep.dropout is set",
    "sync_ref_model": "align's reference policy does not change during training",
    "ref_model_*": "align's reference policy does not change during training",
    "f_divergence_type": "align supports only the reverse KL",
    "f_alpha_divergence_coef": "align supports only the reverse KL",
    "reference_free": "use loss: simpo or orpo",
    "use_weighting": "align has no weighted DPO",
    "loss_weights": "write nll_coef",
    "discopop_tau": "align has no DiscoPOP",
    "use_liger*": _KERNEL,
    "activation_offloading": _KERNEL,
    "torch_compile*": _KERNEL,
    "gradient_checkpointing_kwargs": _KERNEL,
    "tf32": "- torch chooses the precision of matrix products on a GPU",
    "neftune_noise_alpha": "align does not add noise to embeddings",
    "router_aux_loss_coef": "align has no router loss",
    "per_device_eval_batch_size": "- micro_tokens determines it",
    "do_eval": "- heldout and eval_every determine it",
    "eval_on_start": "- align always evaluates before the first step",
    "eval_accumulation_steps": "- micro_tokens determines it",
    "hub_*": "- uploading is a separate command: align push",
    "push_to_hub*": "- uploading is a separate command: align push",
    "log*": "- every step is logged",
    "num_completions_to_print": "- samples are logged",
    "wandb_*": "- the tracker's own settings come from its environment variables",
    "run_name": "- the key 'name' names the run",
    "overwrite_output_dir": "- align never overwrites a finished stage without --force",
    "resume_from_checkpoint": "- the same command resumes",
    "remove_unused_columns": "- a reward gets all columns of a row",
    "disable_tqdm": "- progress bars are shown only on a terminal",
    "dataloader_*": "- affects only the loading of the data",
    "ddp_*": "- align uses DeepSpeed's launcher",
    "load_best_model_at_end": "- early stopping keeps the best weights",
    "save_only_model": "- a checkpoint is always complete",
    "save_safetensors": "- weights are always saved as safetensors",
    "callbacks": "align does not run callbacks",
    "benchmarks": "use a stage of kind evaluate",
    "vllm_importance_sampling_*": "write importance: {mode, level, cap}",
    "vllm_*": _WHERE,
    "top_k": "samples from another distribution than the policy's",
    "min_p": "samples from another distribution than the policy's",
    "repetition_penalty": "samples from another distribution than the policy's",
    "generation_kwargs": "write these settings in sampling",
    "normalize_advantages": "align's rloo does not scale advantages",
    "reward_clip_range": "align does not clip the sum of the rewards",
    "cosine_*": "a setting of open-r1's own reward functions",
    "repetition_*": "a setting of open-r1's own reward functions",
    "code_*": "a setting of open-r1's own reward functions",
    "e2b_*": "a setting of open-r1's own reward functions",
    "parallel_code_exec_per_proc": "a setting of open-r1's own reward functions",
    "total_episodes": "write steps: total_episodes / prompts_per_step",
    "vf_coef": "the critic has its own optimizer: critic.optim",
    "cliprange_value": "write critic.clip",
    "whiten_rewards": "write whiten_rewards",
    "missing_eos_penalty": (
        "write truncated_score, which replaces the score; TRL subtracts its penalty"
    ),
    "stop_token": "- the tokenizer's stop token ends a response",
    "auto_find_batch_size": "write micro_tokens",
}


def convert(keys: Keys, method: str | None) -> Draft:
    """Return the recipe of a configuration.

    Args:
        keys: the configuration.
        method: the trainer, which the configuration itself does not name; None to infer it.

    Raises:
        RecipeError: the trainer cannot be inferred, or a value is invalid.
    """
    trainer = method or infer(keys)
    if trainer not in KINDS:
        raise keys.wrong("output_dir", f"--method {trainer}: expected one of {', '.join(KINDS)}")
    draft = Draft(keys, STAGES.get(trainer, trainer))
    _set_model(draft)
    _set_tuning(draft)
    _set_data(draft)
    length = int(keys.number("max_length") or keys.number("max_seq_length") or 1024)
    if keys.flag("gradient_checkpointing", True):
        draft.stage["gradient_checkpointing"] = True
    defaults = Defaults(RATES.get(trainer, 1e-6))
    set_training(draft, Names(), defaults, max_length=length)
    _set_method(draft, trainer)
    set_evaluation(draft)
    keys.report_rest(REASONS, tool=TOOL)
    return draft


def infer(keys: Keys) -> str:
    """Return the trainer that a configuration is for, from keys that only one has.

    Raises:
        RecipeError: no such key, or those of several trainers.
    """
    told = {
        "rloo": ("normalize_advantages", "reward_clip_range"),
        "grpo": ("num_generations", "reward_funcs", "max_completion_length", "num_iterations"),
        "ppo": ("reward_model_path", "num_ppo_epochs", "cliprange"),
        "kto": ("desirable_weight", "undesirable_weight"),
        "reward": ("center_rewards_coefficient",),
        "sft": ("max_seq_length", "packing", "assistant_only_loss", "dataset_text_field"),
    }
    found = [kind for kind, names in told.items() if any(keys.has(name) for name in names)]
    words = keys.text("output_dir").lower().replace("_", "-").replace("/", "-").split("-")
    keys.taken.discard("output_dir")
    named = [kind for kind in KINDS if kind in words]
    if found[:1] == ["grpo"] and "rloo" in named:
        found = ["rloo"]
    if not found and keys.has("beta"):
        found = named or ["dpo"]
    found = found or named
    if not found and keys.has("max_length"):
        found = ["sft"]
    if not found:
        raise keys.wrong("output_dir", f"the trainer is not named; add --method {'|'.join(KINDS)}")
    return found[0]


def _set_model(draft: Draft) -> None:
    keys = draft.keys
    path = keys.text("sft_model_path") if draft.kind == "ppo" else ""
    draft.base["path"] = path or keys.text("model_name_or_path")
    keys.take("model_name_or_path")
    if not draft.base["path"]:
        raise keys.wrong("model_name_or_path", "is missing")
    if keys.data.get("model_revision") == "main":
        keys.take("model_revision")
    tokenizer: dict[str, Any] = {}
    template = keys.text("chat_template")
    if "{%" in template or "{{" in template:
        draft.files["chat_template.jinja"] = str(keys.data["chat_template"])
        tokenizer["chat_template"] = "${RECIPE_DIR}/chat_template.jinja"
    elif template:
        tokenizer["chat_template"] = template
    if keys.has("chat_template_path"):
        tokenizer["chat_template"] = keys.text("chat_template_path")
    for name, own in (("pad_token", "pad_token"), ("eos_token", "stop_token")):
        if keys.has(name):
            tokenizer[own] = keys.text(name)
    if tokenizer:
        draft.base["tokenizer"] = tokenizer


def _set_tuning(draft: Draft) -> None:
    keys = draft.keys
    if not keys.flag("use_peft"):
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            if keys.has(name):
                keys.take(name)
                keys.note(name, "without use_peft there is no adapter: no effect")
        return
    method = "qlora" if keys.flag("load_in_4bit") else "lora"
    if keys.flag("use_dora"):
        method = "dora"
    elif keys.flag("use_rslora") and method == "lora":
        method = "rslora"
    draft.stage["tuning"] = adapter_of(draft, Adapter(), method)


def _set_data(draft: Draft) -> None:
    keys, stage = draft.keys, draft.stage
    train, held, name, frac = _sources(keys)
    if not train:
        raise keys.wrong("dataset_name", "no data set is named")
    rename = {}
    for key, field in (("dataset_text_field", "text"), ("dataset_prompt_column", "prompt")):
        if keys.has(key):
            rename[keys.text(key)] = field
    rename = {old: new for old, new in rename.items() if old != new}
    if rename:
        train = [{**source, "rename": rename} for source in train]
    stage["prompts" if draft.online else "data"] = train
    if held and draft.online:
        keys.note(name, "an online stage evaluates with 'watch' and scorers of its own", lost=True)
    elif held:
        stage["heldout"] = held
    hold_out(draft, name, frac)


def _sources(keys: Keys) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str, Any]:
    """Return training and held-out sources, the key that names them, and a held-out fraction."""
    if keys.has("dataset_mixer"):
        return (*_mixer(keys), "dataset_splits", None)
    for name in ("dataset_mixture", "datasets"):
        if keys.has(name):
            return _mixture(keys, name)
    path, config = keys.text("dataset_name"), keys.text("dataset_config")
    configs = keys.texts("dataset_configs")
    if len(configs) > 1:
        keys.note("dataset_configs", "one source for each; the first is taken", lost=True)
    config = config or (configs[0] if configs else "")
    split, test = keys.text("dataset_train_split", "train"), keys.text("dataset_test_split")
    train = [source_of(path, split=split, config=config)] if path else []
    held = [source_of(path, split=test, config=config)] if path and test else []
    return train, held, "dataset_test_split", None


def _mixer(keys: Keys) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    mixer = keys.mapping("dataset_mixer")
    splits = keys.texts("dataset_splits") or ["train", "test"]
    configs = keys.texts("dataset_configs")
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for i, path in enumerate(mixer.data):
        if mixer.number(path) != 1:
            mixer.note(path, "takes a fraction of the rows; write 'rows'", lost=True)
        config = configs[i] if i < len(configs) else ""
        for split in splits:
            sides["test" in split].append(source_of(path, split=split, config=config))
    return sides


def _mixture(keys: Keys, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str, Any]:
    inner = keys.mapping(name) if isinstance(keys.data[name], dict) else None
    entries = (inner or keys).mappings("datasets" if inner else name)
    sources = []
    for entry in entries:
        path = entry.text("id") or entry.text("path")
        config = entry.text("config") or entry.text("name")
        sources.append(source_of(path, split=entry.text("split"), config=config))
        if entry.number("weight", 1.0) != 1:
            entry.note("weight", "takes a fraction of the rows; write 'rows'", lost=True)
        entry.report_rest({"columns": "- columns are chosen by the format"}, tool=TOOL)
    frac = inner.number("test_split_size") if inner else None
    if inner:
        inner.report_rest({"seed": "- the split is by a hash of the prompts"}, tool=TOOL)
    return sources, [], name, frac


def _set_method(draft: Draft, trainer: str) -> None:
    keys, stage = draft.keys, draft.stage
    if trainer in ("grpo", "rloo"):
        rows, rloo = keys.count("per_device_train_batch_size", 8), trainer == "rloo"
        set_grpo(draft, keys, rows=rows, beta=0.05 if rloo else 0.0, rloo=rloo)
    elif trainer == "ppo":
        _set_ppo(draft)
    elif trainer in ("dpo", "orpo", "kto"):
        stage["beta"] = float(keys.number("beta", 0.1))
    if trainer == "orpo":
        stage["loss"] = "orpo"
    elif trainer == "dpo":
        _set_dpo(draft)
    elif trainer == "kto":
        for name in ("desirable_weight", "undesirable_weight"):
            if keys.has(name):
                stage[name] = float(keys.number(name))
    elif trainer == "reward":
        stage["center_coef"] = float(keys.number("center_rewards_coefficient", 0.0))


def _set_dpo(draft: Draft) -> None:
    keys, stage = draft.keys, draft.stage
    losses = keys.texts("loss_type") or ["sigmoid"]
    extra = [loss for loss in losses if loss == "sft"]
    named = [loss for loss in losses if loss != "sft"]
    if extra:
        stage["nll_coef"] = 1.0
    if not named or named[0] not in PAIR_LOSSES:
        told = f"{', '.join(losses)}; align has {', '.join(PAIR_LOSSES)}"
        raise keys.wrong("loss_type", told)
    stage["loss"] = named[0]
    if len(named) > 1:
        keys.note("loss_type", f"only {named[0]} of {', '.join(named)}", lost=True)
    for name, own in (("rpo_alpha", "nll_coef"), ("ld_alpha", "ld_alpha")):
        if keys.has(name):
            stage[own] = float(keys.number(name))
    if keys.number("label_smoothing"):
        stage["label_smoothing"] = float(keys.number("label_smoothing"))
    if stage["loss"] == "simpo":
        stage["gamma"] = float(keys.number("simpo_gamma", 0.5))


def _set_ppo(draft: Draft) -> None:
    keys, stage = draft.keys, draft.stage
    rows = keys.count("per_device_train_batch_size", 8)
    accumulated = keys.count("gradient_accumulation_steps", 1)
    minibatches = keys.count("num_mini_batches", 1)
    stage["prompts_per_step"] = rows * accumulated * minibatches
    stage["minibatches"] = minibatches
    stage["update_epochs"] = keys.count("num_ppo_epochs", 4)
    new = keys.count("response_length", 53)
    stage["sampling"] = {"max_new_tokens": new}
    stage["max_length"] = max(stage["max_length"], new + 1)
    stage["kl"] = {"coef": float(keys.number("kl_coef", 0.05))}
    for name in ("gamma", "lam"):
        if keys.has(name):
            stage[name] = float(keys.number(name))
    clip = float(keys.number("cliprange", 0.2))
    if stage["minibatches"] * stage["update_epochs"] > 1:
        stage["clip"] = {"low": clip, "high": clip}
    model = keys.text("reward_model_path")
    if model:
        stage["rewards"] = [{"kind": "scalar", "model": model}]
        keys.note("reward_model_path", "the reward model must be one that align trained", lost=True)
    else:
        stage["rewards"] = rewards_of(keys)
