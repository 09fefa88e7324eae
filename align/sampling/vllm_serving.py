"""vLLM as a server uses it: requests come and go at any time, each with a LoRA adapter or none."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from align.core.errors import TrainingError
from align.sampling.vllm_sampler import rank_without_compiler
from align.sampling.vllm_start import (
    CPU_BLOCK_SIZE,
    ENVIRONMENT,
    MAX_BATCHED_TOKENS,
    MAX_RUNNING,
    import_llm,
)

MAX_LORAS, MAX_CPU_LORAS = 4, 16
"""Adapters in one batch, and adapters that stay loaded."""
CACHE_GIB, MEMORY_FRAC = 1.0, 0.4
"""Cache on a CPU, and fraction of an accelerator's memory for weights and cache."""


def serving_engine(folder: Path, *, context: int, max_rank: int) -> Any:
    """Return an engine of vLLM in this process, which has the model of a folder.

    Raises:
        TrainingError: vLLM cannot start.
    """
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    llm = import_llm()
    platform: dict[str, Any] = {"gpu_memory_utilization": MEMORY_FRAC}
    if not torch.cuda.is_available():
        rank_without_compiler()
        platform = {
            "kv_cache_memory_bytes": int(CACHE_GIB * 2**30),
            "block_size": CPU_BLOCK_SIZE,
            "max_num_seqs": MAX_RUNNING,
            # A prompt in two steps would rewind its generator, which the CPU's cannot.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, context),
            "enforce_eager": True,
        }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        engine = llm(
            model=str(folder),
            # vLLM would halve the precision of a model that is saved in float32.
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            max_model_len=context,
            enable_lora=True,
            max_loras=MAX_LORAS,
            max_cpu_loras=MAX_CPU_LORAS,
            max_lora_rank=max_rank,
            enable_prefix_caching=True,
            generation_config="vllm",
            trust_remote_code=False,
            use_tqdm_on_load=False,
            **platform,
        )
    except (ValueError, RuntimeError) as error:
        raise TrainingError(f"vLLM cannot start on {folder}: {error}") from error
    return engine.llm_engine


def streamed_params(**settings: Any) -> Any:
    """Return vLLM's settings of a request whose output comes in parts.

    Only the stop tokens among ``settings`` end it, not those of the model's configuration.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(ignore_eos=True, output_kind=RequestOutputKind.DELTA, **settings)


def saved_adapter(folder: str, number: int) -> Any:
    """Return the request option that selects the adapter in a folder, by a number of its own."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(folder, number, folder)
