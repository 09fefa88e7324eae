"""vLLM alone: the same prompts and limits as a rollout, without a trainer around it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gate import Gate
from benchmarks.workloads import read_rows

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def rollout(gate: Gate, work: Mapping[str, Any]) -> None:
    """Call ``LLM.generate`` on token ids, with or without log-probabilities, as the row says."""
    os.environ.update(ENVIRONMENT)
    import torch
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    torch.set_num_threads(work["threads"])
    folder = Path(work["folder"])
    model = str(folder / "base" / "model")
    on_cpu = not torch.cuda.is_available()
    extra: dict[str, Any] = {"gpu_memory_utilization": 0.5}
    if on_cpu:
        extra = {
            "kv_cache_memory_bytes": int(work["cache_gib"] * 2**30),
            "enforce_eager": True,
            "max_num_batched_tokens": max(4096, work["max_length"]),
        }
    settings = dict(work["settings"])
    logprobs = settings.pop("logprobs", None)
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype=work["dtype"],
        max_model_len=work["max_length"],
        max_num_seqs=256,
        **extra | settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [
        {"prompt_token_ids": tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]}
        for row in read_rows(folder / "rows.jsonl")
    ]
    params = SamplingParams(
        n=work["group_size"],
        max_tokens=work["new_tokens"],
        temperature=1.0,
        stop_token_ids=[0],
        ignore_eos=True,
        logprobs=logprobs,
        detokenize=False,
    )
    gate.ready()
    while True:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        gate.done(tokens=sum(len(a.token_ids) for o in outputs for a in o.outputs))
