"""Convert a configuration of LLaMA-Factory to a recipe."""

import json
from pathlib import Path
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
from align.recipe.foreign.trl import REASONS as TRAINER_REASONS

TOOL = "LLaMA-Factory"
KINDS = {"pt": "sft", "sft": "sft", "rm": "reward", "dpo": "dpo", "kto": "kto", "ppo": "ppo"}
LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
TEMPLATES = {
    "chatml": "chatml",
    "llama3": "llama3",
    "qwen": "qwen2_5",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gpt_oss": "gpt_oss",
    "qwen3_nothink": "qwen3_instruct",
}
INFO = "dataset_info.json"

EQUIVALENTS = {
    "model_name_or_path": "`stages.base.path`",
    "stage": "kind of the stage: pt and sft become sft, rm becomes reward; dpo, kto and ppo keep "
    "their names",
    "template": "`stages.base.tokenizer.chat_template`",
    "finetuning_type, lora_*, use_dora, use_rslora, pissa_init, quantization_bit": "`tuning`",
    "dataset, dataset_dir, eval_dataset": "`data`, `heldout`, looked up in dataset_info.json if "
    "it exists",
    "max_samples": "`rows`",
    "val_size": "`heldout` with `split: heldout` and `heldout_frac`",
    "cutoff_len": "`max_length`",
    "per_device_train_batch_size, gradient_accumulation_steps": "`batch_size`, `micro_tokens`",
    "num_train_epochs, max_steps": "`epochs`, `steps`",
    "learning_rate, lr_scheduler_*, warmup_*, weight_decay, adam_*, max_grad_norm, optim": (
        "`optim`"
    ),
    "bf16, fp16, pure_bf16": "`dtype`",
    "save_strategy, save_steps, save_total_limit": "`checkpoint_every`, `keep_checkpoints`",
    "eval_strategy, eval_steps": "`eval_every`",
    "deepspeed, fsdp": "`zero`",
    "report_to, use_swanlab, seed, output_dir": "`sinks`, `seed`, `name`",
    "pref_beta, pref_loss, pref_ftx, simpo_gamma, dpo_label_smoothing": (
        "`beta`, `loss`, `nll_coef`, `gamma`, `label_smoothing`"
    ),
    "kto_chosen_weight, kto_rejected_weight": "`desirable_weight`, `undesirable_weight`",
    "reward_model, ppo_epochs, ppo_buffer_size, ppo_target, max_new_tokens, temperature": (
        "`rewards`, `update_epochs`, `minibatches`, `kl.target`, `sampling`"
    ),
}
_KERNEL = "- selects a kernel; the result is the same"
_IMAGES = "align trains on text only; images and audio are not supported"
REASONS = {
    **TRAINER_REASONS,
    "do_train": "- align run trains",
    "do_predict": "use a stage of kind evaluate",
    "predict_with_generate": "use a stage of kind evaluate",
    "compute_accuracy": "use a stage of kind evaluate",
    "adapter_name_or_path": "start from another stage's model instead: init",
    "ref_model*": "the reference is the model before training",
    "reward_model_*": "the reward model must be one that align trained",
    "quantization_*": "- qlora uses doubly quantized NF4",
    "double_quantization": "- qlora uses doubly quantized NF4",
    "additional_target": "align does not fully train embeddings and head together with an adapter",
    "loraplus_*": "align uses one learning rate for both matrices of an adapter",
    "pissa_*": "- align has its own fast decomposition and conversion",
    "create_new_adapter": "- every stage starts with a new adapter",
    "freeze_*": "write layers: {freeze_first: N}, which counts from the bottom layer",
    "use_galore": "align supports only AdamW",
    "galore_*": "align supports only AdamW",
    "use_apollo": "align supports only AdamW",
    "apollo_*": "align supports only AdamW",
    "use_badam": "align supports only AdamW",
    "badam_*": "align supports only AdamW",
    "use_adam_mini": "align supports only AdamW",
    "use_muon": "align supports only AdamW",
    "use_dft_loss": "align has no dynamic fine-tuning loss",
    "use_llama_pro": "align does not add layers",
    "use_asft_loss": "align has no such loss",
    "mask_history": "align trains every assistant turn",
    "train_on_prompt": "align trains on the assistant turns only",
    "neat_packing": "- rows are packed without padding in every stage",
    "packing": "- rows are packed without padding in every stage",
    "mix_strategy": "- sources are mixed in proportion to their rows",
    "interleave_probs": "write weight in each source",
    "streaming": "align always reads files completely",
    "buffer_size": "align always reads files completely",
    "overwrite_cache": "- align reads the rows again in each run",
    "tokenized_path": "- align reads the rows again in each run",
    "cache_dir": "- set HF_HOME",
    "preprocessing_*": "- align chooses the number of worker processes",
    "plot_loss": "- the report draws the curves",
    "flash_attn": "- align chooses the attention kernel; the result is the same",
    "enable_liger_kernel": _KERNEL,
    "use_unsloth": _KERNEL,
    "use_unsloth_gc": _KERNEL,
    "use_reentrant_gc": _KERNEL,
    "disable_gradient_checkpointing": "write gradient_checkpointing",
    "upcast_*": "- norms and the head compute in float32",
    "shift_attn": "align has no shifted sparse attention",
    "rope_scaling": "set it in the model's config.json",
    "resize_vocab": "align does not resize the vocabulary",
    "new_special_tokens": "align adds no tokens except a pad token",
    "add_tokens": "align adds no tokens except a pad token",
    "add_special_tokens": "align adds no tokens except a pad token",
    "split_special_tokens": "special tokens in text are never parsed as special tokens",
    "use_fast_tokenizer": "- align always uses the fast tokenizer",
    "default_system": "align adds no system turn; put it into the rows",
    "enable_thinking": "write chat_template: qwen3 or qwen3_instruct",
    "tool_format": "the chat template writes tools and tool calls in its own format",
    "moe_aux_loss_coef": "align has no router loss",
    "low_cpu_mem_usage": "- affects only the loading of the model",
    "infer_*": "- affects only inference after training",
    "vllm_*": "- affects only inference after training",
    "export_*": "- exporting is a separate command: align export",
    "hf_hub_token": "set HF_TOKEN in the environment; never write a token into a recipe",
    "ms_hub_token": "align reads from the Hugging Face hub and from folders",
    "swanlab_*": "- the tracker's own settings come from its environment variables",
    "include_*": "- align always logs this",
    "top_p": "a value below 1 samples from another distribution than the policy's",
    "do_sample": "- align always samples responses",
    "ppo_score_norm": "- align normalizes a learned reward",
    "ppo_whiten_rewards": "write whiten_rewards",
    "dpo_*": "align has no such loss term",
    "ld_alpha": "write ld_alpha",
    "pref_bco_weight": "align has no BCO loss",
    "image_*": _IMAGES,
    "video_*": _IMAGES,
    "audio_*": _IMAGES,
    "media_dir": _IMAGES,
}


def convert(keys: Keys, method: str | None) -> Draft:
    """Return the recipe of a configuration.

    Raises:
        RecipeError: it cannot be converted at all, for the reason in the message.
    """
    given = keys.text("stage", method or "sft").lower()
    if given not in KINDS:
        raise keys.wrong("stage", f"'{given}' is not a stage; expected one of {', '.join(KINDS)}")
    for name in ("image_max_pixels", "video_max_pixels", "audio_sampling_rate", "media_dir"):
        if keys.has(name):
            raise keys.wrong(name, _IMAGES)
    draft = Draft(keys, KINDS[given])
    _set_model(draft)
    _set_tuning(draft)
    _set_data(draft, pretraining=given == "pt")
    length = keys.count("cutoff_len", 2048)
    if not keys.flag("disable_gradient_checkpointing"):
        draft.stage["gradient_checkpointing"] = True  # LLaMA-Factory's default
    set_training(draft, Names(), Defaults(5e-5), max_length=length)
    _set_method(draft)
    set_evaluation(draft)
    keys.report_rest(REASONS, tool=TOOL)
    return draft


def _set_model(draft: Draft) -> None:
    keys = draft.keys
    draft.base["path"] = keys.text("model_name_or_path")
    if not draft.base["path"]:
        raise keys.wrong("model_name_or_path", "is missing")
    template = keys.text("template")
    if template.endswith(("_vl", "_omni")) or template in ("llava", "mllama", "pixtral"):
        raise keys.wrong("template", _IMAGES)
    if template in TEMPLATES:
        draft.base["tokenizer"] = {"chat_template": TEMPLATES[template]}
        if template == "gpt_oss":
            told = "the same turns, behind the model's own system text, which LLaMA-Factory omits"
            keys.note("template", told)
    elif template and template not in ("default", "empty"):
        told = f"'{template}'; the tokenizer's own template is used, or give a Jinja file"
        keys.note("template", told, lost=True)


def _set_tuning(draft: Draft) -> None:
    keys = draft.keys
    kind = keys.text("finetuning_type", "lora").lower()
    bits = keys.number("quantization_bit")
    if kind == "full":
        return
    if kind == "freeze":
        told = "trains the top layers; write layers: {freeze_first: N}. All layers are trained"
        keys.note("finetuning_type", told, lost=True)
        return
    if kind == "oft":
        draft.stage["tuning"] = {"method": "oft"}
        return
    if kind != "lora":
        raise keys.wrong("finetuning_type", f"'{kind}'; expected full, lora, freeze or oft")
    method = "lora"
    if bits == 4:
        method = "qlora"
    elif bits is not None:
        keys.note("quantization_bit", f"{bits} bits; align has 4 (qlora)", lost=True)
    if keys.flag("use_dora"):
        method = "dora"
    elif keys.flag("pissa_init"):
        method = "pissa"
    elif keys.flag("use_rslora") and method == "lora":
        method = "rslora"
    names = Adapter("lora_rank", "lora_target", default_rank=8, default_alpha=None)
    draft.stage["tuning"] = adapter_of(draft, names, method)


def _set_data(draft: Draft, *, pretraining: bool) -> None:
    keys, stage = draft.keys, draft.stage
    names = keys.texts("dataset")
    if not names:
        raise keys.wrong("dataset", "is missing")
    info, folder = _info(keys)
    rows = keys.number("max_samples")

    def sources(key: str) -> list[dict[str, Any]]:
        found = [
            _source(keys, key, name, info=info, folder=folder, pretraining=pretraining)
            for name in keys.texts(key)
        ]
        return [{**source, "rows": int(rows)} for source in found] if rows else found

    stage["prompts" if draft.online else "data"] = sources("dataset")
    if keys.has("eval_dataset") and not draft.online:
        stage["heldout"] = sources("eval_dataset")
    if rows:
        keys.note("max_samples", "the first rows there, drawn at random here")
    hold_out(draft, "val_size", keys.number("val_size"))


def _info(keys: Keys) -> tuple[dict[str, Any], Path]:
    """Return the entries of dataset_info.json and its folder; no entries where it is missing."""
    given = Path(keys.text("dataset_dir", "data"))
    beside = Path(keys.marks[()].file).parent
    for folder in (given, beside / given, *(up / given for up in beside.resolve().parents[:3])):
        try:
            found = json.loads((folder / INFO).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found, folder
    return {}, given


def _source(
    keys: Keys, key: str, name: str, *, info: dict[str, Any], folder: Path, pretraining: bool
) -> dict[str, Any]:
    entry = info.get(name)
    if not isinstance(entry, dict):
        if Path(name).exists():
            return source_of(name)
        why = f"is not in {folder / INFO}" if info else f"{folder / INFO} was not found"
        path = f"{folder}/{name}.json"
        keys.note(key, f"'{name}': {why}; write its file or hub id in place of {path}", lost=True)
        return source_of(path)
    columns = entry.get("columns") or {}
    sharegpt = entry.get("formatting") == "sharegpt"
    # LLaMA-Factory's name of each column, and the field that stands for it in this suite.
    usual = (
        {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
        if sharegpt
        else {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "history": "history",
            "chosen": "chosen",
            "rejected": "rejected",
        }
    )
    if pretraining:
        usual = {"prompt": "text"}
    rename = {str(columns[part]): field for part, field in usual.items() if part in columns}
    if entry.get("tags"):
        keys.note(key, f"'{name}': has 'tags'; rename the fields of the turns in the data")
    path = entry.get("hf_hub_url") or str(folder / str(entry.get("file_name", name)))
    source = source_of(
        str(path),
        split=str(entry.get("split", "")),
        config=str(entry.get("subset", "")),
        rename=rename,
    )
    return source


def _set_method(draft: Draft) -> None:
    keys, stage = draft.keys, draft.stage
    if draft.kind in ("dpo", "kto"):
        stage["beta"] = float(keys.number("pref_beta", 0.1))
    if draft.kind == "dpo":
        loss = keys.text("pref_loss", "sigmoid")
        if loss not in LOSSES:
            raise keys.wrong("pref_loss", f"'{loss}'; align has {', '.join(LOSSES)}")
        stage["loss"] = LOSSES[loss]
        if keys.number("pref_ftx") and loss != "orpo":
            stage["nll_coef"] = float(keys.number("pref_ftx"))
        if loss == "simpo":
            stage["gamma"] = float(keys.number("simpo_gamma", 0.5))
        if keys.number("dpo_label_smoothing"):
            stage["label_smoothing"] = float(keys.number("dpo_label_smoothing"))
    if draft.kind == "kto":
        for name, own in (
            ("kto_chosen_weight", "desirable_weight"),
            ("kto_rejected_weight", "undesirable_weight"),
        ):
            if keys.has(name):
                stage[own] = float(keys.number(name))
    if draft.kind == "reward":
        stage["center_coef"] = 0.0
    if draft.kind == "ppo":
        _set_ppo(draft)


def _set_ppo(draft: Draft) -> None:
    keys, stage = draft.keys, draft.stage
    rows = keys.count("per_device_train_batch_size", 8)
    accumulated = keys.count("gradient_accumulation_steps", 1)
    buffers = keys.count("ppo_buffer_size", 1)
    stage["prompts_per_step"] = rows * accumulated * buffers
    stage["minibatches"] = buffers
    stage["update_epochs"] = keys.count("ppo_epochs", 4)
    new = keys.count("max_new_tokens", 512)
    sampling: dict[str, Any] = {"max_new_tokens": new}
    if keys.number("temperature", 1.0) != 1.0:
        sampling["temperature"] = float(keys.number("temperature"))
    stage["sampling"] = sampling
    stage["max_length"] += new
    if keys.number("top_k"):
        keys.note("top_k", "samples from another distribution than the policy's", lost=True)
    stage["kl"] = {"coef": 0.2, "target": float(keys.number("ppo_target", 6.0))}
    model = keys.text("reward_model")
    if not model:
        raise keys.wrong("reward_model", "is missing")
    stage["rewards"] = [{"kind": "scalar", "model": model}]
    told = "must be a reward model that align trained: convert its configuration (stage: rm) too"
    keys.note("reward_model", told, lost=True)
