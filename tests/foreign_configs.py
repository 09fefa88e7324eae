"""Configurations in the layout of public examples of axolotl, LLaMA-Factory and TRL.

Keys and values as in the repositories axolotl-ai-cloud/axolotl (examples/), hiyouga/LLaMA-Factory
(examples/), huggingface/alignment-handbook and huggingface/open-r1 (recipes/); the names of the
entries are the names of the files there. ``OWN`` has layouts that these examples lack.
"""

from typing import Any

Config = dict[str, Any]


def nothing(*names: str) -> Config:
    """Keys that the examples of axolotl leave empty."""
    return dict.fromkeys(names)


WANDB = nothing("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model")
OLD = nothing(
    *("early_stopping_patience", "resume_from_checkpoint", "local_rank", "xformers_attention"),
    *("debug", "deepspeed", "fsdp", "fsdp_config", "fp16", "special_tokens", "eval_table_size"),
)
RATE = {"optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine", "learning_rate": 0.0002}
LORA = {
    **{"adapter": "lora", "lora_model_dir": None, "lora_r": 32, "lora_alpha": 16},
    **{"lora_dropout": 0.05, "lora_target_linear": True},
}
QLORA = LORA | {"adapter": "qlora", "load_in_8bit": False, "load_in_4bit": True}
BATCH = {"gradient_accumulation_steps": 4, "micro_batch_size": 2, "num_epochs": 4}
GPU = {
    **{"bf16": "auto", "tf32": False, "gradient_checkpointing": True, "logging_steps": 1},
    **{"flash_attention": True, "saves_per_epoch": 1, "weight_decay": 0.0},
}
AXOLOTL_BASE = WANDB | OLD | BATCH | RATE | GPU | {"dataset_prepared_path": None}
ALPACA = [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}]
CHAT_PAIRS = [
    {
        **{"path": "fozziethebeat/alpaca_messages_2k_dpo_test", "type": "chat_template.default"},
        **{"field_messages": "conversation", "field_chosen": "chosen"},
        "field_rejected": "rejected",
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles": {"system": ["system"], "user": ["user"], "assistant": ["assistant"]},
    }
]
PROJECTIONS = ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"]

AXOLOTL: dict[str, Config] = {
    "llama-3/lora-8b.yml": AXOLOTL_BASE
    | LORA
    | {
        **{"base_model": "NousResearch/Meta-Llama-3-8B", "model_type": "LlamaForCausalLM"},
        **{"tokenizer_type": "AutoTokenizer", "load_in_8bit": True, "load_in_4bit": False},
        **{"datasets": ALPACA, "val_set_size": 0.05, "output_dir": "./outputs/lora-out"},
        **{"sequence_len": 4096, "sample_packing": True, "eval_sample_packing": False},
        **{"lora_modules_to_save": ["embed_tokens", "lm_head"], "warmup_ratio": 0.1},
        **{"evals_per_epoch": 4, "special_tokens": {"pad_token": "<|end_of_text|>"}},
    },
    "llama-3/qlora.yml": AXOLOTL_BASE
    | QLORA
    | {
        **{"base_model": "NousResearch/Meta-Llama-3-8B", "model_type": "AutoModelForCausalLM"},
        **{"tokenizer_type": "AutoTokenizer", "strict": False, "val_set_size": 0},
        "datasets": [{"path": "tatsu-lab/alpaca", "type": "alpaca"}],
        **{"output_dir": "./outputs/qlora-out", "sequence_len": 4096, "sample_packing": True},
        **{"pad_to_sequence_len": True, "lora_target_modules": None, "lora_fan_in_fan_out": None},
        **{"optimizer": "paged_adamw_32bit", "train_on_inputs": False, "group_by_length": False},
        **{"warmup_steps": 10, "evals_per_epoch": 4},
        "special_tokens": {"pad_token": "<|end_of_text|>"},
    },
    "llama-3/fft-8b.yaml": AXOLOTL_BASE
    | {
        **{"base_model": "meta-llama/Meta-Llama-3-8B", "model_type": "LlamaForCausalLM"},
        **{"load_in_8bit": False, "load_in_4bit": False, "strict": False, "val_set_size": 0.05},
        "datasets": [{"path": "tatsu-lab/alpaca", "type": "alpaca"}],
        **{"output_dir": "./out", "sequence_len": 8192, "gradient_accumulation_steps": 8},
        **{"micro_batch_size": 1, "num_epochs": 1, "optimizer": "paged_adamw_8bit"},
        **{"learning_rate": 2e-5, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        **{"warmup_steps": 100, "evals_per_epoch": 2},
    },
    "llama-3/instruct-dpo-lora-8b.yml": AXOLOTL_BASE
    | LORA
    | {
        "base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "special_tokens": {"pad_token": "<|finetune_right_pad_id|>", "eos_token": "<|eot_id|>"},
        **{"load_in_8bit": True, "chat_template": "llama3", "rl": "dpo", "datasets": CHAT_PAIRS},
        **{"val_set_size": 0.05, "output_dir": "./outputs/lora-out", "sequence_len": 4096},
        **{"sample_packing": False, "pad_to_sequence_len": True, "warmup_steps": 10},
    },
    "llama-3/qlora-1b-kto.yaml": AXOLOTL_BASE
    | QLORA
    | {
        **{"base_model": "meta-llama/Llama-3.2-1B", "strict": False, "rl": "kto", "rl_beta": 0.5},
        "kto_desirable_weight": 0.2,
        "datasets": [
            {
                "path": "argilla/ultrafeedback-binarized-preferences-cleaned-kto",
                **{"type": "llama3.ultra", "split": "train"},
            }
        ],
        **{"val_set_size": 0.0, "output_dir": "./outputs/qlora-out", "sequence_len": 2048},
        **{"remove_unused_columns": False, "lora_alpha": 64, "gradient_accumulation_steps": 1},
        **{"num_epochs": 1, "optimizer": "adamw_8bit", "tf32": True, "warmup_steps": 20},
        **{"evals_per_epoch": 4, "eval_max_new_tokens": 128},
    },
    "llama-3/qlora-1b.yml": AXOLOTL_BASE
    | QLORA
    | {
        "base_model": "NousResearch/Llama-3.2-1B",
        "datasets": [{"path": "teknium/GPT4-LLM-Cleaned", "type": "alpaca"}],
        **{"val_set_size": 0.1, "output_dir": "./outputs/qlora-out", "sequence_len": 2048},
        **{"lora_target_linear": None, "lora_target_modules": PROJECTIONS, "num_epochs": 1},
        **{"attn_implementation": "flash_attention_2", "loss_watchdog_threshold": 5.0},
        **{"loss_watchdog_patience": 3, "warmup_ratio": 0.1, "evals_per_epoch": 4},
    },
    "gemma2/reward-model.yaml": AXOLOTL_BASE
    | {
        **{"base_model": "google/gemma-2-2b", "num_labels": 1, "reward_model": True},
        **{"model_type": "AutoModelForSequenceClassification", "chat_template": "gemma"},
        "datasets": [
            {
                "path": "argilla/distilabel-intel-orca-dpo-pairs",
                "type": "bradley_terry.chat_template",
            }
        ],
        **{"val_set_size": 0.0, "output_dir": "./outputs/out", "remove_unused_columns": False},
        **{"sequence_len": 2048, "sample_packing": False, "bf16": True, "warmup_ratio": 0.1},
    },
    "qwen2/prm.yaml": AXOLOTL_BASE
    | {
        **{"base_model": "Qwen/Qwen2.5-0.5B", "num_labels": 2, "process_reward_model": True},
        **{"model_type": "AutoModelForTokenClassification", "chat_template": None},
        "datasets": [{"path": "trl-lib/math_shepherd", "type": "stepwise_supervised"}],
        **{"val_set_size": 0.0, "output_dir": "./outputs/out", "sequence_len": 2048},
        **{"gradient_accumulation_steps": 1, "micro_batch_size": 8, "num_epochs": 1},
        **{"optimizer": "adamw_torch", "bf16": True, "tf32": None, "warmup_ratio": 0.1},
    },
    "qwen2/dpo.yaml": AXOLOTL_BASE
    | {
        **{"base_model": "Qwen/Qwen2.5-0.5B", "strict": False, "chat_template": "qwen_25"},
        **{"rl": "dpo", "datasets": CHAT_PAIRS, "val_set_size": 0.0, "sequence_len": 2048},
        **{"output_dir": "./outputs/dpo-out", "warmup_steps": 10, "evals_per_epoch": 4},
    },
    "mistral/mistral-qlora-orpo.yml": AXOLOTL_BASE
    | QLORA
    | {
        **{"base_model": "mistralai/Mistral-7B-v0.1", "model_type": "MistralForCausalLM"},
        **{"tokenizer_type": "LlamaTokenizer", "rl": "orpo", "orpo_alpha": 0.1},
        "chat_template": "chatml",
        "datasets": [
            {
                "path": "argilla/ultrafeedback-binarized-preferences-cleaned",
                "type": "orpo.chat_template",
            }
        ],
        **{"val_set_size": 0.1, "output_dir": "./mistral-qlora-orpo-out", "sequence_len": 4096},
        **{"lora_target_modules": PROJECTIONS, "num_epochs": 1, "warmup_steps": 10},
    },
    "phi/phi-ft.yml": AXOLOTL_BASE
    | {
        **{"base_model": "microsoft/phi-1_5", "model_type": "PhiForCausalLM"},
        **{"is_llama_derived_model": False, "trust_remote_code": True, "val_set_size": 0.05},
        "datasets": [{"path": "garage-bAInd/Open-Platypus", "type": "alpaca"}],
        **{"output_dir": "./phi-sft-out", "sequence_len": 2048, "sample_packing": True},
        **nothing("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_linear"),
        **{"gradient_accumulation_steps": 1, "micro_batch_size": 1, "optimizer": "adamw_torch"},
        **{"adam_beta2": 0.95, "adam_epsilon": 0.00001, "max_grad_norm": 1.0},
        **{"learning_rate": 0.000003, "group_by_length": True, "fp16": False, "tf32": True},
        **{"warmup_steps": 100, "weight_decay": 0.1, "resize_token_embeddings_to_32x": True},
        "special_tokens": dict.fromkeys(
            ("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"
        ),
    },
    "archived/tiny-llama/pretrain.yml": AXOLOTL_BASE
    | {
        **{"base_model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "max_steps": 200},
        "pretraining_dataset": [{"path": "allenai/c4", "name": "en", "type": "pretrain"}],
        **{"val_set_size": 0.0, "output_dir": "./outputs/model-out", "sequence_len": 2048},
        **{"sample_packing": True, "warmup_ratio": 0.1},
    },
    "archived/code-llama/7b/lora.yml": AXOLOTL_BASE
    | LORA
    | {
        **{"base_model": "codellama/CodeLlama-7b-hf", "tokenizer_type": "CodeLlamaTokenizer"},
        **{"load_in_8bit": True, "datasets": ALPACA, "val_set_size": 0.05, "sequence_len": 4096},
        **{"output_dir": "./outputs/lora-out", "warmup_ratio": 0.1},
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    },
}

FACTORY_BASE = {
    **{"model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "do_train": True},
    **{"template": "llama3", "cutoff_len": 2048, "max_samples": 1000, "overwrite_cache": True},
    **{"preprocessing_num_workers": 16, "logging_steps": 10, "save_steps": 500},
    **{"plot_loss": True, "overwrite_output_dir": True, "per_device_train_batch_size": 1},
    **{"gradient_accumulation_steps": 8, "learning_rate": 1.0e-4, "num_train_epochs": 3.0},
    **{"lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True},
    **{"ddp_timeout": 180000000, "dataset": "identity,alpaca_en_demo", "stage": "sft"},
    "output_dir": "saves/llama3-8b/lora/sft",
}
FACTORY_LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
EVALUATED = {
    **{"val_size": 0.1, "per_device_eval_batch_size": 1, "eval_strategy": "steps"},
    "eval_steps": 500,
}
FACTORY: dict[str, Config] = {
    "train_lora/llama3_lora_sft.yaml": FACTORY_BASE | FACTORY_LORA | {"trust_remote_code": True},
    "train_lora/llama3_lora_dpo.yaml": FACTORY_BASE
    | FACTORY_LORA
    | {
        **{"stage": "dpo", "pref_beta": 0.1, "pref_loss": "sigmoid", "dataset": "dpo_en_demo"},
        **{"learning_rate": 5.0e-6, "output_dir": "saves/llama3-8b/lora/dpo"},
    },
    "train_lora/llama3_lora_kto.yaml": FACTORY_BASE
    | FACTORY_LORA
    | EVALUATED
    | {"stage": "kto", "pref_beta": 0.1, "dataset": "kto_en_demo", "learning_rate": 5.0e-6},
    "train_lora/llama3_lora_reward.yaml": FACTORY_BASE
    | FACTORY_LORA
    | {"stage": "rm", "dataset": "dpo_en_demo", "output_dir": "saves/llama3-8b/lora/reward"},
    "train_lora/llama3_lora_ppo.yaml": FACTORY_BASE
    | FACTORY_LORA
    | {
        **{"stage": "ppo", "reward_model": "saves/llama3-8b/lora/reward", "top_p": 0.9},
        **{"learning_rate": 1.0e-5, "max_new_tokens": 512, "top_k": 0},
    },
    "train_lora/llama3_lora_pretrain.yaml": FACTORY_BASE
    | FACTORY_LORA
    | {"stage": "pt", "dataset": "c4_demo", "template": None},
    "train_full/llama3_full_sft.yaml": FACTORY_BASE
    | {
        **{"finetuning_type": "full", "deepspeed": "examples/deepspeed/ds_z3_config.json"},
        **{"gradient_accumulation_steps": 2, "learning_rate": 1.0e-5},
    },
    "train_qlora/llama3_lora_sft_otfq.yaml": FACTORY_BASE
    | FACTORY_LORA
    | EVALUATED
    | {"quantization_bit": 4, "quantization_method": "bitsandbytes"},
    "extras/pissa/llama3_lora_sft.yaml": FACTORY_BASE
    | FACTORY_LORA
    | {
        **{"pissa_init": True, "pissa_iter": 16, "pissa_convert": True, "report_to": "none"},
        **{"dataloader_num_workers": 4, "save_only_model": False},
    },
    "extras/galore/llama3_full_sft.yaml": FACTORY_BASE
    | EVALUATED
    | {
        **{"finetuning_type": "full", "use_galore": True, "galore_layerwise": True},
        **{"galore_target": "mlp,self_attn", "galore_rank": 128, "galore_scale": 2.0},
        **{"cutoff_len": 1024, "gradient_accumulation_steps": 1, "warmup_steps": 0.1},
        **{"warmup_ratio": None, "bf16": None, "pure_bf16": True},
    },
    "train_lora/qwen2_5vl_lora_sft.yaml": FACTORY_BASE
    | FACTORY_LORA
    | {
        **{"model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "image_max_pixels": 262144},
        **{"template": "qwen2_vl", "dataset": "mllm_demo,identity", "video_max_pixels": 16384},
    },
}

JINJA = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
TRL_BASE = {
    **{"torch_dtype": "bfloat16", "attn_implementation": "flash_attention_2", "bf16": True},
    **{"model_revision": "main", "gradient_checkpointing": True, "log_level": "info"},
    **{"gradient_checkpointing_kwargs": {"use_reentrant": False}, "logging_steps": 5},
    **{"logging_strategy": "steps", "lr_scheduler_type": "cosine", "max_steps": -1},
    **{"num_train_epochs": 1, "overwrite_output_dir": True, "push_to_hub": True, "seed": 42},
    **{"hub_strategy": "every_save", "report_to": ["wandb"], "save_total_limit": 1},
    "warmup_ratio": 0.1,
}


def mixture(name: str, *splits: str, columns: list[str], size: float) -> Config:
    """The data of alignment-handbook."""
    datasets = [
        {"id": name, "config": "default", "split": s, "columns": columns, "weight": 1.0}
        for s in splits
    ]
    return {"dataset_mixture": {"datasets": datasets, "test_split_size": size, "seed": 0}}


GRPO = {
    **{"use_vllm": True, "vllm_gpu_memory_utilization": 0.7, "max_prompt_length": 512},
    **{"max_completion_length": 1024, "num_generations": 16, "log_completions": True},
    **{"per_device_train_batch_size": 16, "gradient_accumulation_steps": 16},
    **{"logging_first_step": True, "learning_rate": 2.0e-05},
}
TRL: dict[str, Config] = {
    "zephyr-7b-beta/sft/config_full.yaml": TRL_BASE
    | mixture(
        *("HuggingFaceH4/ultrachat_200k", "train_sft", "test_sft"), columns=["messages"], size=1000
    )
    | {
        **{"model_name_or_path": "mistralai/Mistral-7B-v0.1", "chat_template": JINJA},
        **{"dataset_num_proc": 12, "do_eval": True, "eval_strategy": "epoch", "save_steps": 100},
        **{"gradient_accumulation_steps": 1, "hub_model_id": "zephyr-7b-sft-full"},
        **{"learning_rate": 2.0e-05, "max_seq_length": 2048, "save_strategy": "steps"},
        **{"output_dir": "data/zephyr-7b-sft-full", "per_device_train_batch_size": 16},
        **{"per_device_eval_batch_size": 8, "remove_unused_columns": True},
    },
    "zephyr-7b-beta/dpo/config_qlora.yaml": TRL_BASE
    | {
        **{"model_name_or_path": "alignment-handbook/zephyr-7b-sft-qlora", "use_peft": True},
        **{"torch_dtype": "float16", "load_in_4bit": True, "lora_r": 16, "lora_alpha": 16},
        **{"lora_dropout": 0.05, "lora_target_modules": PROJECTIONS, "beta": 0.01},
        "dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0},
        **{"dataset_splits": ["train_prefs", "test_prefs"], "preprocessing_num_workers": 12},
        **{"do_eval": True, "evaluation_strategy": "steps", "eval_steps": 100},
        **{"learning_rate": 5.0e-6, "max_length": 1024, "max_prompt_length": 512},
        **{"optim": "paged_adamw_32bit", "output_dir": "data/zephyr-7b-dpo-qlora"},
        **{"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 100},
    },
    "zephyr-7b-beta/dpo/config_full.yaml": TRL_BASE
    | mixture(
        *("HuggingFaceH4/ultrafeedback_binarized", "train_prefs", "test_prefs"),
        columns=["chosen", "rejected"],
        size=2000,
    )
    | {
        **{"model_name_or_path": "alignment-handbook/zephyr-7b-sft-full", "torch_dtype": None},
        **{"beta": 0.01, "do_eval": True, "eval_strategy": "steps", "eval_steps": 100},
        **{"gradient_accumulation_steps": 2, "learning_rate": 5.0e-7, "max_length": 1024},
        **{"max_prompt_length": 512, "optim": "adamw_torch", "per_device_train_batch_size": 8},
        "output_dir": "data/zephyr-7b-dpo-full",
    },
    "mistral-capybara/orpo/config_full.yaml": TRL_BASE
    | {
        **{"model_name_or_path": "mistralai/Mistral-7B-v0.1", "use_flash_attention_2": True},
        **{"chat_template": JINJA, "dataset_splits": ["train"], "beta": 0.05, "warmup_steps": 100},
        "dataset_mixer": {"argilla/distilabel-capybara-dpo-7k-binarized": 1.0},
        **{"warmup_ratio": None, "lr_scheduler_type": "inverse_sqrt", "max_length": 2048},
        **{"max_prompt_length": 1792, "num_train_epochs": 3, "optim": "adamw_bnb_8bit"},
        **{"per_device_train_batch_size": 8, "report_to": ["tensorboard", "wandb"]},
        **{"save_strategy": "no", "learning_rate": 5.0e-6, "output_dir": "data/orpo"},
    },
    "smollm/sft/config.yaml": TRL_BASE
    | mixture(
        *("HuggingFaceTB/everyday-conversations-llama3.1-2k", "train_sft", "test_sft"),
        columns=["messages"],
        size=0.05,
    )
    | {
        **{"model_name_or_path": "HuggingFaceTB/SmolLM-360M", "chat_template": JINJA},
        **{"dataset_kwargs": {"add_special_tokens": False}, "eval_strategy": "epoch"},
        **{"gradient_accumulation_steps": 4, "learning_rate": 1.0e-03, "max_length": 2048},
        **{"output_dir": "data/smollm-360M-instruct-new", "per_device_train_batch_size": 4},
        "save_strategy": "no",
    },
    "Qwen2.5-1.5B-Instruct/grpo/config_demo.yaml": TRL_BASE
    | GRPO
    | {
        **{"model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "dataset_configs": ["all"]},
        **{"dataset_name": "AI-MO/NuminaMath-TIR", "num_processes": 7, "vllm_device": "auto"},
        **{"do_eval": True, "eval_strategy": "steps", "eval_steps": 100, "num_generations": 7},
        **{"output_dir": "data/Qwen2.5-1.5B-Open-R1-GRPO", "save_strategy": "epoch"},
    },
    "Qwen2.5-Math-7B/grpo/config_simple_rl.yaml": TRL_BASE
    | GRPO
    | {
        "model_name_or_path": "aidando73/Qwen-2.5-7B-Simple-RL-v2",
        **{"dataset_name": "DigitalLearningGmbH/MATH-lighteval", "dataset_config": "default"},
        **{"system_prompt": "You are a helpful math assistant.", "reward_weights": [1.0, 0.5]},
        **{"reward_funcs": ["accuracy", "format"], "num_generations": 7, "learning_rate": 1.5e-06},
        **{"max_prompt_length": 650, "gradient_accumulation_steps": 8, "save_strategy": "epoch"},
        "wandb_project": "open-r1-math-rl",
    },
    "OpenR1-Zero-7B-Math/grpo/config_v08.00.yaml": TRL_BASE
    | GRPO
    | {
        **{"model_name_or_path": "Qwen/Qwen2.5-7B", "chat_template": JINJA, "beta": 0.0},
        **{"dataset_name": "open-r1/DAPO-Math-17k-Processed", "dataset_config": "all"},
        **{"callbacks": ["push_to_hub_revision"], "benchmarks": ["math_500", "aime24"]},
        **{"generation_batch_size": 512, "max_completion_length": 8192, "num_iterations": 1},
        **{"lr_scheduler_type": "constant_with_warmup", "mask_truncated_completions": True},
        **{"max_grad_norm": 0.2, "per_device_train_batch_size": 4, "epsilon": 0.2},
        **{"reward_funcs": ["accuracy", "format", "soft_format"], "sync_ref_model": False},
        **{"reward_weights": [1.0, 0.25, 0.25], "save_steps": 0.1, "temperature": 1.0},
    },
    "OlympicCoder-7B/sft/config_v00.00.yaml": TRL_BASE
    | {
        "model_name_or_path": "Qwen/Qwen2.5-Coder-7B-Instruct",
        **{"dataset_name": "open-r1/codeforces-cots", "dataset_num_proc": 48},
        **{"dataset_config": "solutions_decontaminated", "eval_strategy": "no"},
        **{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        **{"packing": False, "max_grad_norm": 0.2, "max_length": 32768, "num_train_epochs": 10},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "save_steps": 0.2},
        **{"use_liger": True, "learning_rate": 1.0e-05, "output_dir": "data/OlympicCoder-7B"},
    },
    "Qwen2.5-Coder-7B-Instruct/grpo/config_codeforces.yaml": TRL_BASE
    | GRPO
    | {
        "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "dataset_name": "open-r1/codeforces-verifiable",
        **{"dataset_prompt_column": "prompt_c++17", "system_prompt": "You are helpful."},
        **{"beta": 0.0, "loss_type": "dr_grpo", "scale_rewards": False, "temperature": 0.7},
        **{"reward_funcs": ["cf_code", "code_format"], "reward_weights": [1.0, 0.1]},
        **{"code_language": "cpp", "code_eval_test_batch_size": 20, "save_steps": 0.05},
        **{"wandb_entity": "huggingface", "mask_truncated_completions": True},
    },
    "SmolLM2-1.7B-Instruct/sft/config.yaml": TRL_BASE
    | {
        "model_name_or_path": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        **{"dataset_name": "open-r1/OpenR1-Math-220k", "dataset_configs": ["default"]},
        **{"max_seq_length": 8192, "weight_decay": 0.0001, "lr_scheduler_type": "linear"},
        **{"packing": True, "learning_rate": 5.0e-05, "per_device_train_batch_size": 4},
        **{"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 500},
        "output_dir": "data/OpenR1-Qwen-7B-SFT",
    },
}

OWN: dict[str, tuple[str, Config]] = {
    "axolotl, grpo": (
        "axolotl",
        {
            **{"base_model": "Qwen/Qwen2.5-0.5B-Instruct", "rl": "grpo", "max_steps": 50},
            "trl": {
                **{"beta": 0.001, "max_completion_length": 256, "num_generations": 4},
                **{"reward_funcs": ["json.dumps"], "use_vllm": True, "vllm_host": "0.0.0.0"},
            },
            "datasets": [{"path": "openai/gsm8k", "name": "main", "split": "train"}],
            **{"micro_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-5},
        },
    ),
    "axolotl, user-defined fields": (
        "axolotl",
        {
            **{"base_model": "EleutherAI/pythia-70m", "sequence_len": 512, "learning_rate": 1e-5},
            "datasets": [
                {
                    "path": "rows.jsonl",
                    "type": {
                        **{"field_instruction": "question", "field_output": "reply"},
                        "format": "[INST] {instruction} [/INST]",
                    },
                }
            ],
        },
    ),
    "TRL, ppo": (
        "trl",
        {
            **{"sft_model_path": "cleanrl/sft", "reward_model_path": "cleanrl/reward"},
            **{"dataset_name": "trl-lib/tldr", "num_ppo_epochs": 4, "num_mini_batches": 1},
            **{"total_episodes": 10000, "missing_eos_penalty": 1.0, "response_length": 53},
        },
    ),
    "TRL, reward": (
        "trl",
        {
            **{"model_name_or_path": "Qwen/Qwen2-0.5B-Instruct", "max_length": 2048},
            **{"dataset_name": "trl-lib/ultrafeedback_binarized", "learning_rate": 1.0e-5},
            **{"center_rewards_coefficient": 0.01, "eval_strategy": "steps", "eval_steps": 50},
        },
    ),
}


def configs() -> list[tuple[str, str, Config]]:
    """Every configuration: its tool, its name, its keys."""
    found = [("axolotl", name, config) for name, config in AXOLOTL.items()]
    found += [("llamafactory", name, config) for name, config in FACTORY.items()]
    found += [("trl", name, config) for name, config in TRL.items()]
    return found + [(tool, name, config) for name, (tool, config) in OWN.items()]
