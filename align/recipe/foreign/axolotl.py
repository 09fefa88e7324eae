"""Convert a configuration of axolotl to a recipe."""

import re
from typing import Any

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
from align.recipe.foreign.online import set_grpo

TOOL = "axolotl"
NAMES = Names("lr_scheduler", "optimizer", "num_epochs", "micro_batch_size")
DEFAULTS = Defaults(2e-4, schedule="cosine", warmup_frac=0.03, epochs=1.0, rows=1)
KINDS = {"dpo": "dpo", "ipo": "dpo", "simpo": "dpo", "orpo": "dpo", "kto": "kto", "grpo": "grpo"}
LOSSES = {"ipo": "ipo", "simpo": "simpo", "orpo": "orpo"}
TEMPLATES = {
    "chatml": "chatml",
    "llama3": "llama3",
    "qwen_25": "qwen2_5",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
}
FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "messages",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "input_output": "segments",
    "stepwise_supervised": "steps",
}
COLUMNS = {
    "argilla": {"chosen_response": "chosen", "rejected_response": "rejected"},
    "intel": {"question": "prompt"},
    "nectar": {},
}
"""Renamed columns of its preference formats, by the last word of the format."""

EQUIVALENTS = {
    "base_model": "`stages.base.path`",
    "rl, reward_model, process_reward_model": "kind of the stage: dpo (also ipo, simpo, orpo), "
    "kto, grpo, reward; sft without them",
    "datasets, pretraining_dataset, test_datasets": "`data`, `heldout`: path, name, split, "
    "revision, data_files, type, field_*",
    "val_set_size": "`heldout` with `split: heldout` and `heldout_frac`",
    "chat_template, chat_template_jinja": "`stages.base.tokenizer.chat_template`",
    "special_tokens": "`pad_token` and `stop_token` (from `eos_token`) of the tokenizer",
    "adapter, load_in_4bit, lora_*, peft_use_dora, peft_use_rslora": "`tuning`",
    "sequence_len": "`max_length`",
    "micro_batch_size, gradient_accumulation_steps": "`batch_size`, `micro_tokens`",
    "num_epochs, max_steps": "`epochs`, `steps`",
    "learning_rate, lr_scheduler, cosine_min_lr_ratio, warmup_*": "`optim`",
    "weight_decay, adam_*, max_grad_norm, optimizer": "`optim`",
    "bf16, fp16": "`dtype`",
    "deepspeed, fsdp": "`zero`",
    "save_steps, save_total_limit": "`checkpoint_every`, `keep_checkpoints`",
    "eval_steps, early_stopping_patience": "`eval_every`, `keep.early_stopping`",
    "rl_beta, dpo_beta, orpo_alpha, simpo_gamma, cpo_alpha": "`beta`, `gamma`, `nll_coef`",
    "kto_desirable_weight, kto_undesirable_weight": "`desirable_weight`, `undesirable_weight`",
    "trl": "the keys of a grpo stage; see TRL",
    "seed, output_dir, wandb_project, use_wandb, use_mlflow": "`seed`, `name`, `sinks`",
}
_DEFAULT = "- align does the same, or the key has no effect on the weights"
REASONS = {
    "model_type": "- the model's config.json determines the class",
    "tokenizer_type": "- the tokenizer's files determine the class",
    "tokenizer_config": "align loads the tokenizer from the model's folder",
    "is_llama_derived_model": _DEFAULT,
    "is_mistral_derived_model": _DEFAULT,
    "is_falcon_derived_model": _DEFAULT,
    "trust_remote_code": "align never runs a model's own Python code",
    "strict": _DEFAULT,
    "num_labels": "- the kind of the stage determines it",
    "load_in_8bit": "align has no 8-bit weights; they keep their dtype (tuning.method: qlora has "
    "4 bits)",
    "load_in_4bit": "supported only with adapter: qlora",
    "dataset_prepared_path": "- align reads the rows again in each run",
    "dataset_processes": "- align chooses the number of worker processes",
    "dataset_*": "- affects only the preparation of the data",
    "shuffle_merged_datasets": _DEFAULT,
    "push_dataset_to_hub": "align does not push prepared data",
    "sample_packing": "- rows are packed without padding in every stage",
    "sample_packing_*": "- rows are packed without padding in every stage",
    "eval_sample_packing": "- rows are packed without padding in every stage",
    "pad_to_sequence_len": "- rows are packed without padding in every stage",
    "multipack_real_batches": "- rows are packed without padding in every stage",
    "group_by_length": "- rows are packed without padding in every stage",
    "train_on_inputs": "align trains on the assistant turns only",
    "lora_model_dir": "start from another stage's model instead: init",
    "lora_fan_in_fan_out": _DEFAULT,
    "lora_modules_to_save": "align does not fully train embeddings and head together with an "
    "adapter",
    "lora_mlp_kernel": "- selects a kernel; the result is the same",
    "lora_qkv_kernel": "- selects a kernel; the result is the same",
    "lora_o_kernel": "- selects a kernel; the result is the same",
    "peft_layers_to_transform": "align adds adapters to every layer",
    "loraplus_*": "align uses one learning rate for both matrices of an adapter",
    "relora_*": "align does not restart adapters",
    "unfrozen_parameters": "use layers.freeze_first, or an adapter",
    "wandb_*": "- the tracker's own settings come from its environment variables",
    "hub_*": "- uploading is a separate command: align push",
    "mlflow_*": "- the tracker's own settings come from its environment variables",
    "comet_*": "align does not support this tracker",
    "swanlab_*": "- the tracker's own settings come from its environment variables",
    "logging_steps": "- every step is logged",
    "log_*": "- every step is logged",
    "save_first_step": _DEFAULT,
    "save_safetensors": "- weights are always saved as safetensors",
    "save_only_model": _DEFAULT,
    "saves_per_epoch": "align counts steps; write checkpoint_every: STEPS",
    "evals_per_epoch": "align counts steps; write eval_every: STEPS",
    "eval_table_size": "- samples are logged in online stages and evaluations",
    "eval_max_new_tokens": "- samples are logged in online stages and evaluations",
    "eval_batch_size": "- micro_tokens determines it",
    "eval_causal_lm_metrics": "use a stage of kind evaluate",
    "do_causal_lm_eval": "use a stage of kind evaluate",
    "do_eval": "- heldout and eval_every determine it",
    "do_bench_eval": "use a stage of kind evaluate",
    "metric_for_best_model": "use keep.early_stopping.metric",
    "load_best_model_at_end": "- early stopping keeps the best weights",
    "resume_from_checkpoint": "- the same command resumes",
    "auto_resume_from_checkpoints": "- the same command resumes",
    "local_rank": _DEFAULT,
    "debug": _DEFAULT,
    "tf32": "- torch chooses the precision of matrix products on a GPU",
    "flash_attention": "- align chooses the attention kernel; the result is the same",
    "flash_attn_*": "- selects a kernel; the result is the same",
    "xformers_attention": "- align chooses the attention kernel; the result is the same",
    "sdp_attention": "- align chooses the attention kernel; the result is the same",
    "eager_attention": "- align chooses the attention kernel; the result is the same",
    "flex_attention": "- align chooses the attention kernel; the result is the same",
    "attn_implementation": "- align chooses the attention kernel; the result is the same",
    "s2_attention": "align has no shifted sparse attention",
    "liger_*": "- selects a kernel; the result is the same",
    "plugins": "align does not run axolotl's plug-ins",
    "cut_cross_entropy": "- align computes the head at trained positions only",
    "torch_compile": "- selects a compiler; the result is the same",
    "torch_compile_backend": "- selects a compiler; the result is the same",
    "unsloth_*": "- selects a kernel; the result is the same",
    "loss_watchdog_threshold": "- a run that does not learn is reported (not_learning)",
    "loss_watchdog_patience": "- a run that does not learn is reported (not_learning)",
    "remove_unused_columns": _DEFAULT,
    "resize_token_embeddings_to_32x": "align does not resize the vocabulary",
    "tokens": "align adds no tokens except a pad token",
    "added_tokens_overrides": "align adds no tokens except a pad token",
    "default_system_message": "align adds no system turn; put it into the rows",
    "roles_to_train": "align trains on the assistant turns only",
    "train_on_eos": "- the token that ends a response is always trained",
    "neftune_noise_alpha": "align does not add noise to embeddings",
    "noisy_embedding_alpha": "align does not add noise to embeddings",
    "rope_scaling": "set it in the model's config.json",
    "overrides_of_model_config": "set it in the model's config.json",
    "model_config": "set it in the model's config.json",
    "gradient_checkpointing_kwargs": "- selects a kernel; the result is the same",
    "cosine_constant_lr_ratio": "align's cosine schedule decays until the last step",
    "context_parallel_size": "align does not split a sequence over ranks",
    "sequence_parallel_degree": "align does not split a sequence over ranks",
    "tensor_parallel_size": "align shards with ZeRO instead",
    "ddp_*": _DEFAULT,
    "gc_steps": _DEFAULT,
    "dataloader_*": _DEFAULT,
    "include_tokens_per_second": "- tokens/per_s is always logged",
    "vllm": "write these settings in sampling",
    "dpo_use_weighting": "align has no weighted DPO",
    "dpo_use_logits_to_keep": _DEFAULT,
    "precompute_ref_log_probs": _DEFAULT,
    "rl_adapter_ref_model": "- the reference is the model before training",
    "revision_of_model": "a base stage loads the newest revision; to use another one, download it "
    "and name its folder",
}
DATASET_REASONS = {
    "ds_type": "- the name of the file determines it",
    "chat_template": "one template for all data: stages.base.tokenizer.chat_template",
    "message_property_mappings": "rename the fields of the turns in the data",
    "message_field_*": "rename the fields of the turns in the data",
    "field_tools": "rename the column to tools, or 'functions'",
    "roles": "rename the roles in the data",
    "roles_to_train": "align trains on the assistant turns only",
    "train_on_eos": "- the token that ends a response is always trained",
    "drop_system_message": "remove the system turns from the data",
    "shards": "use 'rows'",
    "preprocess_shards": "- affects only the preparation of the data",
    "conversation": "one template for all data: stages.base.tokenizer.chat_template",
    "trust_remote_code": "align never runs a data set's own Python code",
}
USUAL_ROLES = {"system": ["system"], "user": ["user"], "assistant": ["assistant"]}
USUAL_FIELDS = (
    {"role": "role", "content": "content"},
    {"role": "from", "content": "value"},
)
TRAINED = ("weight", "loss", "train", "trainable", "train_on_turn", "loss_mask")
"""Fields of a turn that say whether it is trained."""


def convert(keys: Keys, method: str | None) -> Draft:
    """Return the recipe of a configuration.

    Raises:
        RecipeError: it cannot be converted at all, for the reason in the message.
    """
    for name in ("processor_type", "is_multimodal"):
        if keys.has(name) and keys.flag(name):
            raise keys.wrong(name, "align trains on text only; images and audio are not supported")
    draft = Draft(keys, method or _kind(keys))
    _set_model(draft)
    _set_tuning(draft)
    _set_data(draft)
    length = keys.count("sequence_len", 512)
    set_training(draft, NAMES, DEFAULTS, max_length=length)
    hold_out(draft, "val_set_size", keys.number("val_set_size"))
    set_evaluation(draft)
    _set_method(draft)
    keys.report_rest(REASONS, tool=TOOL)
    return draft


def _kind(keys: Keys) -> str:
    if keys.flag("reward_model") or keys.flag("process_reward_model"):
        return "reward"
    rl = keys.text("rl").lower()
    if rl and rl not in KINDS:
        raise keys.wrong("rl", f"'{rl}' has no stage in align; it has {', '.join(KINDS)}")
    return KINDS[rl] if rl else "sft"


def _set_model(draft: Draft) -> None:
    keys = draft.keys
    draft.base["path"] = keys.text("base_model")
    if not draft.base["path"]:
        raise keys.wrong("base_model", "is missing")
    tokenizer = {}
    special = keys.mapping("special_tokens")
    if special.has("pad_token"):
        tokenizer["pad_token"] = special.text("pad_token")
    if special.has("eos_token"):
        tokenizer["stop_token"] = special.text("eos_token")
    kept = "- the tokenizer's own token is used"
    special.report_rest(dict.fromkeys(("bos_token", "unk_token"), kept), tool=TOOL)
    template, jinja = keys.text("chat_template"), keys.text("chat_template_jinja")
    if jinja and template in ("", "jinja"):
        draft.files["chat_template.jinja"] = jinja
        tokenizer["chat_template"] = "${RECIPE_DIR}/chat_template.jinja"
    elif template in TEMPLATES:
        tokenizer["chat_template"] = TEMPLATES[template]
    elif template and template != "tokenizer_default":
        told = f"'{template}'; the tokenizer's own template is used, or give a Jinja file"
        keys.note("chat_template", told, lost=True)
    if tokenizer:
        draft.base["tokenizer"] = tokenizer


def _set_tuning(draft: Draft) -> None:
    keys = draft.keys
    adapter = keys.text("adapter").lower()
    if not adapter:
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear"):
            if keys.has(name):
                keys.take(name)
                keys.note(name, "without adapter there is none: no effect")
        return
    if adapter not in ("lora", "qlora", "lora_dora"):
        raise keys.wrong("adapter", f"'{adapter}' has no equivalent; expected lora or qlora")
    method = adapter if adapter != "lora_dora" else "dora"
    if keys.flag("peft_use_dora"):
        method = "dora"
    elif keys.flag("peft_use_rslora") and method == "lora":
        method = "rslora"
    if keys.flag("load_in_4bit") and method == "lora":
        method = "qlora"
    draft.stage["tuning"] = adapter_of(draft, Adapter(default_rank=8, default_alpha=16), method)


def _set_data(draft: Draft) -> None:
    keys = draft.keys
    name = "pretraining_dataset" if keys.has("pretraining_dataset") else "datasets"
    if isinstance(keys.data.get(name), str):
        sources = [source_of(keys.text(name), form="text")]
    else:
        sources = [_source(draft, entry) for entry in keys.mappings(name)]
    if not sources:
        raise keys.wrong(name, "is missing")
    draft.stage["prompts" if draft.online else "data"] = sources
    held = [_source(draft, entry) for entry in keys.mappings("test_datasets")]
    if held:
        draft.stage["heldout"] = held


def _source(draft: Draft, entry: Keys) -> dict[str, Any]:
    path = entry.text("path")
    files = entry.texts("data_files")
    if files and path.lower() in ("json", "csv", "parquet", "text", "arrow", ""):
        path = files[0]
        if len(files) > 1:
            entry.note("data_files", "one entry for each file; the first is taken", lost=True)
    elif files:
        entry.note("data_files", "the files of the split are read", lost=True)
    form, rename = _form(draft, entry)
    split = entry.text("split")
    if found := re.fullmatch(r"([\w.-]+)\[.*\]", split):
        entry.note("split", f"'{split}'; the whole split is read, 'rows' takes fewer", lost=True)
        split = found[1]
    source = source_of(
        path,
        split=split,
        config=entry.text("name"),
        revision=entry.text("revision"),
        rename=rename,
        form=form,
    )
    _forgive_defaults(entry)
    entry.report_rest(DATASET_REASONS, tool=TOOL)
    return source


def _forgive_defaults(entry: Keys) -> None:
    """Count mappings of roles and fields as read if they say what align assumes."""
    if entry.data.get("roles") == USUAL_ROLES:
        entry.take("roles")
    if entry.data.get("message_property_mappings") in USUAL_FIELDS:
        entry.take("message_property_mappings")
    if entry.data.get("roles_to_train") == ["assistant"]:
        entry.take("roles_to_train")
    if entry.data.get("message_field_training") in TRAINED:
        entry.take("message_field_training")
    if entry.data.get("field_tools") in ("tools", "functions"):
        entry.take("field_tools")


def _form(draft: Draft, entry: Keys) -> tuple[str, dict[str, str]]:
    """Return the format of an entry, empty to detect it, and its renamed fields."""
    if isinstance(entry.data.get("type"), dict):
        return _own_form(entry.mapping("type"))
    kind = entry.text("type")
    first, _, last = kind.partition(".")
    if draft.kind in ("dpo", "kto") or kind.startswith("bradley_terry"):
        rename = dict(COLUMNS.get(last.split("_")[0], {}))
        if entry.has("field_messages"):
            rename[entry.text("field_messages")] = "prompt"
        for side in ("chosen", "rejected"):
            if entry.has(f"field_{side}"):
                rename[entry.text(f"field_{side}")] = side
        return "", rename
    messages = entry.text("field_messages", "messages" if first == "chat_template" else "")
    if messages == "conversations":
        return "sharegpt", {}
    rename = {messages: "messages"} if messages else {}
    if entry.has("field"):
        rename[entry.text("field")] = "text"
    if entry.has("text_column"):
        rename[entry.text("text_column")] = "text"
    form = FORMATS.get(first.split(":")[0], "")
    if kind and not form and draft.online:
        told = f"'{kind}' is a function of axolotl's; write map: FILE.py:FUNCTION, which gets a row"
        entry.note("type", told, lost=True)
    elif kind and not form:
        entry.note("type", f"'{kind}': the format is detected from the keys of the rows")
    return ("" if draft.online else form), rename


def _own_form(inner: Keys) -> tuple[str, dict[str, str]]:
    """Return the format of a user-defined type: alpaca's fields under other names."""
    rename = {}
    for part in ("instruction", "input", "output", "system"):
        if inner.has(f"field_{part}"):
            rename[inner.text(f"field_{part}")] = part
    inner.report_rest(
        dict.fromkeys(
            ("format", "no_input_format", "system_prompt", "system_format"),
            "the wording around a row is the chat template's, or that of 'templates'",
        ),
        tool=TOOL,
    )
    return "alpaca", rename


def _set_method(draft: Draft) -> None:
    keys, stage = draft.keys, draft.stage
    rl = keys.text("rl").lower()
    if rl in LOSSES:
        stage["loss"] = LOSSES[rl]
    if draft.kind in ("dpo", "kto"):
        inner = keys.mapping("trl")
        names = ("rl_beta", "dpo_beta", "orpo_alpha")
        betas = [keys.number(name) for name in names if keys.has(name)] + [inner.number("beta")]
        stage["beta"] = next((float(b) for b in betas if b), 0.1)
        inner.report_rest({}, tool=TOOL)
    if rl == "simpo":
        stage["gamma"] = float(keys.number("simpo_gamma", 0.5))
        stage["nll_coef"] = float(keys.number("cpo_alpha", 1.0))
    if keys.has("dpo_label_smoothing"):
        stage["label_smoothing"] = keys.number("dpo_label_smoothing")
    if draft.kind == "kto":
        for side in ("desirable_weight", "undesirable_weight"):
            if keys.has(f"kto_{side}"):
                stage[side] = float(keys.number(f"kto_{side}"))
    if draft.kind == "reward":
        if keys.flag("process_reward_model"):
            stage["supervision"] = "steps"
        else:
            stage["center_coef"] = float(keys.number("center_rewards_coefficient", 0.0))
    if draft.kind == "grpo":
        inner = keys.mapping("trl")
        # As in axolotl, the block's own beta is the one that counts.
        beta = float(keys.number("rl_beta", 0.0))
        set_grpo(draft, inner, rows=keys.count("micro_batch_size", 1), beta=beta)
        inner.report_rest({"vllm_*": "- write sampling"}, tool=TOOL)
