"""Start vLLM in the trainer's process with the options of a recipe."""

import gc
from contextlib import ExitStack
from typing import Any

import torch

from align.core.distributed import wait_limit
from align.core.errors import TrainingError
from align.core.extras import as_if_absent, without_collections
from align.recipe.schema.tuning import LoraTuning
from align.sampling.engine import EngineOptions
from align.sampling.memory import engine_share
from align.sampling.vllm_push import adapter_options
from align.sampling.vllm_sampler import cheapen_sampling

MAX_RUNNING = 256
"""Number of responses that are decoded at the same time on CPU, unless the recipe sets it."""

MAX_BATCHED_TOKENS = 4096
"""Number of prompt tokens in one step on CPU."""

CPU_BLOCK_SIZE = 32
"""Tokens per cache block: the smallest size that its CPU attention supports, to share prompts."""

_UNUSED = ("scipy.signal", "opentelemetry")
"""What vLLM imports for audio and for tracing requests, which nothing here does."""

_GROUP_LIMITS = ("distributed_timeout_seconds", "cpu_distributed_timeout_seconds")
"""vLLM's options for how long its workers wait for each other, on a GPU and on CPU."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # FlashInfer cannot return log-probabilities after top_p, which every request needs.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
"""Environment variables that vLLM reads on import; a user's own setting takes precedence."""


def platform_options(options: EngineOptions, *, on_cpu: bool) -> dict[str, Any]:
    """Return vLLM's options that depend on the device and on the recipe's limits."""
    found: dict[str, Any]
    if on_cpu:
        running = options.max_num_seqs or MAX_RUNNING
        found = {
            "kv_cache_memory_bytes": int(options.cache_gib * 2**30),
            "block_size": CPU_BLOCK_SIZE,
            "max_num_seqs": running,
            # A prompt split over two steps rewinds its request's generator. torch's CPU generator
            # cannot do that, and vLLM 0.31 crashes ("does not use offset").
            "enable_chunked_prefill": False,
            # vLLM refuses fewer tokens than responses.
            "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, options.max_model_len, running),
            "enforce_eager": True,
        }
    else:
        share = options.memory_frac
        if share is None:
            share = engine_share(options.held_bytes)
        found = {"gpu_memory_utilization": share, "enable_sleep_mode": True}
        if options.max_num_seqs is not None:
            found["max_num_seqs"] = options.max_num_seqs
    if options.cache_dtype != "auto":
        found["kv_cache_dtype"] = options.cache_dtype
    return found


def import_llm() -> Any:
    """Import vLLM without parts that nothing here uses, and return its class ``LLM``."""
    with ExitStack() as stack:
        stack.enter_context(without_collections())
        for module in _UNUSED:
            stack.enter_context(as_if_absent(module))
        from vllm import LLM
    # The engine collects garbage several times and then freezes everything itself; what is frozen
    # before costs it nothing. Closing the engine undoes both.
    gc.freeze()
    return LLM


def start_llm(options: EngineOptions, *, on_cpu: bool) -> Any:
    """Construct vLLM with minimal start-up work.

    Raises:
        TrainingError: vLLM cannot start; the message contains its reason.
    """
    llm = import_llm()
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    platform = platform_options(options, on_cpu=on_cpu)
    if on_cpu:
        cheapen_sampling()
    if options.push == "adapter":
        assert isinstance(options.tuning, LoraTuning), options.tuning
        platform |= adapter_options(options.tuning)
    if world_size > 1:
        # Use this rank's device and no extra process: the launcher's ranks are the workers.
        if on_cpu:
            _exchange_by_gloo()
        platform["distributed_executor_backend"] = "external_launcher"
        platform["tensor_parallel_size"] = options.tensor_parallel
        platform |= dict.fromkeys(_GROUP_LIMITS, int(wait_limit().total_seconds()))
    try:
        return llm(
            model=str(options.model_dir),
            skip_tokenizer_init=True,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            seed=options.seed,
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            use_tqdm_on_load=False,
            **platform,
        )
    except (ValueError, RuntimeError) as error:
        raise TrainingError(
            f"vLLM cannot start on {options.model_dir}: {error}. Change {_keys(options)} or "
            "max_length as it says, or use sampling.engine: hf."
        ) from error


def _keys(options: EngineOptions) -> str:
    """Return the keys that a failed start may be about."""
    keys = ["cache_gib", "memory_frac"]
    keys += ["max_num_seqs"] if options.max_num_seqs is not None else []
    keys += ["cache_dtype"] if options.cache_dtype != "auto" else []
    return ", ".join(f"sampling.{key}" for key in keys)


def _exchange_by_gloo() -> None:
    """Make the workers of one engine exchange tensors through torch's groups on CPU.

    vLLM's shared memory has one name for all engines that a launcher started on a machine, and a
    killed rank leaves it behind. vLLM itself uses torch's groups for ranks on several machines.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
