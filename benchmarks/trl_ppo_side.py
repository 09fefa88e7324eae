"""TRL's last PPO (trl.experimental.ppo of 1.12), run by the interpreter that has that version."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from benchmarks.gate import Gate
from benchmarks.trl_sides import GateCallback
from benchmarks.workloads import read_rows


def ppo(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train PPOTrainer; a round is one step with its update epochs."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(work["threads"])
    folder = Path(work["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base" / "model", padding_side="left")
    settings = dict(work["settings"])
    load = {"dtype": getattr(torch, settings.pop("weights", "float32"))}
    micro = settings["per_device_train_batch_size"]
    rows = [
        {"input_ids": tokenizer(r["prompt"], add_special_tokens=False)["input_ids"]}
        for r in read_rows(folder / "rows.jsonl")
    ]

    def scorer(**load: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            folder / "base" / "model", num_labels=1, **load
        )

    arguments = {
        "output_dir": work["out"],
        "total_episodes": 10_000 * work["rows"],
        # TRL draws micro x accumulation rows a step and cuts its mini-batches from them.
        "gradient_accumulation_steps": work["rows"] // micro,
        "num_mini_batches": work["minibatches"],
        "num_ppo_epochs": work["update_epochs"],
        "response_length": work["new_tokens"],
        "stop_token": "eos",
        "kl_coef": 0.05,
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "num_sample_generations": 0,
        "report_to": "none",
        "bf16": work["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    trainer = PPOTrainer(
        args=PPOConfig(**arguments | settings),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder / "base" / "model", **load),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "base" / "model", **load),
        reward_model=scorer(dtype=getattr(torch, work["dtype"])),
        value_model=scorer(**load),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[GateCallback(gate)],
    )
    assert trainer.args.batch_size == work["rows"], trainer.args.batch_size
    trainer.train()
