"""What it costs to push a LoRA to vLLM alone, or merged into whole weights; prints a table.

    python -m benchmarks.adapter_push

Rank 16 on every linear layer. Each row is a process of its own: 16 prompts of 19 tokens, 4 answers
of 64 tokens to each; the medians of 5 pushes and 5 rollouts, the first ones left out.
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

SIZES = ((128, 4), (320, 8))
"""Hidden size and layers."""
VOCAB, ROUNDS = 4096, 5


def save_model(folder: Path, hidden: int, layers: int) -> None:
    """Write a random Qwen2 with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)


def measure(hidden: int, layers: int, push: str) -> None:
    """Print one row."""
    import torch

    from align.recipe.schema.tuning import LoraTuning
    from align.sampling.build import build_engine
    from align.sampling.engine import EngineOptions
    from align.sampling.push import pushed_weights
    from align.tuning.loading import load_for_training

    torch.set_num_threads(1)
    tuning = LoraTuning(method="lora", rank=16)
    prompts = [[3 + i, *range(10, 28)] for i in range(16)]
    pushes, rates = [], []
    with tempfile.TemporaryDirectory() as place:
        save_model(Path(place), hidden, layers)
        model = load_for_training(Path(place), tuning, dtype="float32")
        engine = build_engine(
            "vllm", EngineOptions(place, max_model_len=128, tuning=tuning, push=push)
        )
        for version in range(1, ROUNDS + 2):
            began = time.perf_counter()
            pushed = pushed_weights(model, adapter_alone=engine.takes_adapter)
            engine.load_weights(pushed, version=version)
            pushes.append(1000.0 * (time.perf_counter() - began))
            began = time.perf_counter()
            groups = engine.generate(
                prompts, n=4, max_new_tokens=64, temperature=1.0, stop_token_ids=()
            )
            tokens = sum(len(answer.token_ids) for group in groups for answer in group)
            rates.append(tokens / (time.perf_counter() - began))
    size = sum(p.numel() for p in model.parameters() if not p.requires_grad) / 1e6
    milliseconds, rate = (statistics.median(values[1:]) for values in (pushes, rates))
    sys.stdout.write(f"| {size:.1f} M | {push} | {milliseconds:.1f} | {rate:.0f} |\n")
    sys.stdout.flush()
    os._exit(0)  # vLLM's own end takes seconds


def main() -> None:
    """Print the table."""
    sys.stdout.write("| model | pushed | push ms | sampled tokens/s |\n|---|---|---|---|\n")
    sys.stdout.flush()
    for size in SIZES:
        for push in ("merged", "adapter"):
            process = multiprocessing.get_context("spawn").Process(
                target=measure, args=(*size, push)
            )
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{size} {push}: exit code {process.exitcode}")


if __name__ == "__main__":
    main()
