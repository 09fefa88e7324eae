"""TRL's sides: its own trainers in the settings a row names, let through a gate step by step.

The data set of a side is exactly one batch, so that an epoch is an optimizer step and both sides
see the same rows in every step, whatever the order or the packing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from benchmarks.gate import Gate
from benchmarks.workloads import read_rows

FOREVER = 10_000
ALL = 10_000
"""Accumulate over more micro-batches than there are: the end of the epoch makes the step."""


class GateCallback(TrainerCallback):
    """End a round at the log line of each optimizer step."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin the rounds."""
        self.gate.ready()

    def on_log(self, *args: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """End a round."""
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        self.gate.done(**numbers)


def _arguments(work: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every row shares; a row's ``settings`` take precedence."""
    shared = {
        "output_dir": work["out"],
        "max_steps": FOREVER,
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "bf16": work["dtype"] == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
    }
    return shared | {k: v for k, v in work["settings"].items() if k != "weights"}


def _parts(work: Mapping[str, Any]) -> tuple[Path, Any, dict[str, Any]]:
    """Return the folder, the tokenizer and the keywords that load a model."""
    torch.set_num_threads(work["threads"])
    folder = Path(work["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base" / "model")
    # float32 weights under autocast keep AdamW's float32 master; "bfloat16" gives that up.
    weights = work["settings"].get("weights", "float32")
    return folder, tokenizer, {"dtype": getattr(torch, weights), "attn_implementation": "sdpa"}


def sft(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train SFTTrainer; a round is one optimizer step over all rows."""
    from trl import SFTConfig, SFTTrainer

    folder, tokenizer, load = _parts(work)
    arguments = {"max_length": work["max_length"], "gradient_accumulation_steps": ALL}
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "base" / "model", **load),
        args=SFTConfig(**arguments | _arguments(work)),
        train_dataset=Dataset.from_list(read_rows(folder / "rows.jsonl")),
        processing_class=tokenizer,
        callbacks=[GateCallback(gate)],
    ).train()


def _scorer(folder: Path, load: Mapping[str, Any]) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "base" / "model", num_labels=1, **load
    )
    with torch.no_grad():
        model.score.weight.copy_(torch.load(folder / "head.pt"))
    return model


def reward(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train RewardTrainer; a round is one optimizer step over all pairs."""
    from trl import RewardConfig, RewardTrainer

    folder, tokenizer, load = _parts(work)
    micro = work["settings"]["per_device_train_batch_size"]
    arguments = {
        "max_length": work["max_length"],
        "gradient_accumulation_steps": work["rows"] // micro,
    }
    RewardTrainer(
        model=_scorer(folder, load),
        args=RewardConfig(**arguments | _arguments(work)),
        train_dataset=Dataset.from_list(_sorted(read_rows(folder / "rows.jsonl"))),
        processing_class=tokenizer,
        callbacks=[GateCallback(gate)],
    ).train()


def _sorted(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Lay like lengths side by side, which pads least; only a sequential sampler keeps it."""
    return sorted(rows, key=lambda r: max(len(r["chosen"]), len(r["rejected"])) + len(r["prompt"]))


def dpo(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train DPOTrainer; a round is one optimizer step, with its reference pass, over all pairs."""
    from trl import DPOConfig, DPOTrainer

    folder, tokenizer, load = _parts(work)
    micro = work["settings"]["per_device_train_batch_size"]
    arguments = {
        "max_length": work["max_length"],
        "gradient_accumulation_steps": work["rows"] // micro,
        "beta": 0.1,
    }
    DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "base" / "model", **load),
        args=DPOConfig(**arguments | _arguments(work)),
        train_dataset=Dataset.from_list(_sorted(read_rows(folder / "rows.jsonl"))),
        processing_class=tokenizer,
        callbacks=[GateCallback(gate)],
    ).train()


def _grpo_trainer(trainer_class: Any, gate: Gate, work: Mapping[str, Any]) -> Any:
    from trl import GRPOConfig

    from reward_models import build_reward

    folder, tokenizer, load = _parts(work)
    answers = work["rows"] * work["group_size"]
    micro = work["settings"]["per_device_train_batch_size"]
    arguments = {
        "num_generations": work["group_size"],
        "max_completion_length": work["new_tokens"],
        "gradient_accumulation_steps": answers // micro,
        "loss_type": "dapo",
        "beta": 0.0,
        "temperature": 1.0,
        "top_k": 0,
    }
    return trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder / "base" / "model", **load),
        args=GRPOConfig(**arguments | _arguments(work)),
        reward_funcs=build_reward({"kind": "regex", "pattern": work["reward_pattern"]}),
        train_dataset=Dataset.from_list(read_rows(folder / "rows.jsonl")),
        processing_class=tokenizer,
        callbacks=[GateCallback(gate)],
    )


def grpo(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train GRPOTrainer with transformers' generate; a round is one step."""
    from trl import GRPOTrainer

    _grpo_trainer(GRPOTrainer, gate, work).train()


def grpo_vllm(gate: Gate, work: Mapping[str, Any]) -> None:
    """Train GRPOTrainer with vLLM as its sampler; a round is one step.

    TRL's own vLLM mode does not run on CPU (its colocate push fails there), so its generation is
    replaced by this project's engine: the same sampler as the other side, pushed before each step.
    """
    from trl import GRPOTrainer

    from align.sampling.build import build_engine
    from align.sampling.engine import EngineOptions

    engine = build_engine(
        "vllm",
        EngineOptions(
            Path(work["folder"]) / "base" / "model",
            dtype=work["dtype"],
            max_model_len=work["max_length"],
            cache_gib=work["cache_gib"],
            stop_token_ids=(0,),
        ),
    )

    class WithEngine(GRPOTrainer):
        def _generate_single_turn(
            self, prompt_ids: Any, images: Any, fields: Any, num_generations: int, *rest: Any
        ) -> Any:
            step = self.state.global_step
            if step != engine.version:
                named = ((n, p.detach()) for n, p in self.model.named_parameters())
                engine.load_weights(named, version=step)
            groups = engine.generate(
                prompt_ids[::num_generations],
                n=num_generations,
                max_new_tokens=self.max_completion_length,
                temperature=1.0,
            )
            return [list(c.token_ids) for g in groups for c in g], None

    _grpo_trainer(WithEngine, gate, work).train()
