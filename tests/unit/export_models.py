"""A tiny policy with a trained adapter, as finished stages of a run."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from align.core.artifacts import write_manifest
from align.data.render.templates import CHATML

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
TEXT = "the sea is blue and a bird sings over the quiet harbor at night while boats sleep"


def tokenizer(*, seed: int = 0) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose merges depend on the seed."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT[seed:]] * 3, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>"
    )
    found.chat_template = CHATML
    return found


def save(model: Any, folder: Path) -> None:
    """Save a model with its tokenizer and stop tokens, the end of a turn and of a text."""
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def policy(kind: str = "llama", *, tied: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    special = {"eos_token_id": 2, "pad_token_id": 3, "bos_token_id": None}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **special, tie_word_embeddings=tied))
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **special, tie_word_embeddings=tied))


def make_run(run: Path, *, kind: str = "llama", tied: bool = False) -> Path:
    """Write the stages base and sft (LoRA, merged) of a run and return sft's folder."""
    base, stage = run / "base", run / "sft"
    save(policy(kind, tied=tied), run / "imported")
    save(policy(kind, tied=tied), base / "model")
    write_manifest(base, _manifest("base", {"path": str(run / "imported")}, {}))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    adapted: PeftModel = get_peft_model(policy(kind, tied=tied), config)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(str(stage / "adapter"))
    save(adapted.merge_and_unload(), stage / "model")
    inputs = {"init": {"path": "base", "spec_hash": "", "manifest_sha256": ""}}
    write_manifest(stage, _manifest("sft", {"tuning": {"method": "lora"}}, inputs))
    return stage


def _manifest(name: str, spec: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "policy",
        "stage": name,
        "stage_kind": name,
        "spec": spec,
        "spec_hash": name,
        "inputs": inputs,
        "data": [{"path": "rows.jsonl", "sha256": "ab" * 32, "rows": 8}],
        "metrics": {"eval/loss": 1.25},
    }


def edit(path: Path, **keys: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
