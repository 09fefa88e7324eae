"""vLLM in the trainer's process, on GPU and CPU: fast sampling from pushed weights."""

import contextlib
import gc
import logging
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.core.errors import TrainingError
from align.core.groups import rank_group
from align.core.types import Completion
from align.sampling.checksums import Share
from align.sampling.engine import (
    ADAPTER,
    EngineOptions,
    call_seeds,
    check_requests,
    load_decoder,
    make_completion,
)
from align.sampling.vllm_push import (
    Loaded,
    adapter_request,
    load_adapter,
    load_in_place,
    load_packed,
    shares,
)
from align.sampling.vllm_start import CPU_BLOCK_SIZE, ENVIRONMENT, start_llm

NO_WEIGHTS = -1
"""Version of an engine on an accelerator that dropped its weights to sleep."""

ASLEEP = ("weights", "kv_cache")
"""vLLM's names for the parts of its memory, in the order in which they wake."""

CACHE_PROBE = CPU_BLOCK_SIZE + 1
"""Tokens of a prompt that is run again after a push: a block and a token to compute.

Without its first block, no later block of a prompt can be found in the cache.
"""


class VllmEngine:
    """One vLLM engine in this process, or this rank's part of one.

    With ``tensor_parallel: 1``, each rank has its own engine and its own requests; only
    construction needs all ranks at once, because vLLM creates process groups inside the trainer's
    world. Otherwise consecutive ranks are the workers of one engine: each has a part of the
    weights, and all of them run the requests of all, in the same order.
    """

    name = "vllm"

    def __init__(self, options: EngineOptions) -> None:
        """Start vLLM with the weights of ``options.model_dir``.

        Raises:
            TrainingError: vLLM cannot start; the message contains its reason.
        """
        started = time.perf_counter()
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        # An older setting of the cache size, in whole GiB, that would override cache_gib.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        self.options = options
        self.takes_adapter = options.push == "adapter"
        self.cache_dtype = options.rounded_cache
        self.version = 0
        self._adapter: Any = None
        self._pushes = 0
        self._calls = 0
        self._asleep: tuple[str, ...] = ()
        self._on_cpu = not torch.cuda.is_available()
        self.device = torch.device("cpu" if self._on_cpu else "cuda")
        self.dtype = getattr(torch, options.dtype)
        self._cached: Sequence[int] = ()
        self._owns_world = not torch.distributed.is_initialized()
        self._decode = load_decoder(options.model_dir)
        self._group = rank_group(options.tensor_parallel)
        with _keep_random_state(), _keep_threads():
            self._llm = start_llm(options, on_cpu=self._on_cpu)
        self.shares: Mapping[str, Share] = self._llm.collective_rpc(shares)[0]
        if not self._owns_world:
            # vLLM's clean-up, which also runs at exit, would destroy the trainer's process group.
            _detach_finalizer(self._core_client)
        if not self._on_cpu:
            self._sleep()
        self.start_s = time.perf_counter() - started

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Use the accelerator's memory inside the block; on CPU nothing is released.

        Each part of the engine wakes when it is used: a push needs no cache.
        """
        try:
            yield
        finally:
            if not self._on_cpu:
                self._sleep()

    def load_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int
    ) -> dict[str, Tensor]:
        """Replace all weights, or the adapter, and clear the prefix cache.

        Raises:
            TrainingError: a weight is unknown, missing or did not reach the layer that uses it; the
                active adapter is not the pushed one; or the cache was not cleared.
        """
        self._wake("weights")
        where = f"weights version {version}"
        try:
            with _keep_random_state():
                loaded = self._load(named_tensors)
        except (KeyError, ValueError, AttributeError, AssertionError) as error:
            raise TrainingError(
                f"{where}: vLLM rejected them ({type(error).__name__}: {error}). "
                "The engine was built from another model, or its vLLM version is not supported."
            ) from error
        if loaded.missing:
            names = ", ".join(sorted(loaded.missing)[:5])
            raise TrainingError(f"{where}: {len(loaded.missing)} missing ({names} ...)")
        if loaded.stale:
            names = ", ".join(sorted(loaded.stale)[:5])
            raise TrainingError(
                f"{where}: {len(loaded.stale)} layers of vLLM still use an outdated packed "
                f"copy of their weights ({names}). Report it with the output of 'align doctor' "
                "and continue with sampling.engine: hf."
            )
        self.version = version
        self._forget_prefixes(where)
        return loaded.held

    def _load(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Loaded:
        if not self.takes_adapter:
            # Runs inside the worker, which is this process: tensors are passed, not copied.
            load = load_packed if self._on_cpu else load_in_place
            return self._llm.collective_rpc(load, args=(named_tensors,))[0]
        # A new number for each adapter: requests, caches and prefixes are looked up by it.
        self._pushes += 1
        named = ((name.removeprefix(ADAPTER), tensor) for name, tensor in named_tensors)
        pushed, tuning = (self._pushes, named), {"tuning": self.options.tuning}
        loaded = self._llm.collective_rpc(load_adapter, args=pushed, kwargs=tuning)[0]
        self._adapter = adapter_request(self._pushes)
        if self._llm.llm_engine.list_loras() != {self._adapter.lora_int_id}:
            raise ValueError(f"it does not serve adapter {self._adapter.lora_int_id} alone")
        held = {f"{ADAPTER}{name}": value for name, value in loaded.held.items()}
        return Loaded(loaded.missing, held=held)

    def _forget_prefixes(self, where: str) -> None:
        """Clear the prefix cache, whose entries for old weights would corrupt new responses.

        The start of the longest prompt of the last call is run again; none of it may come from the
        cache.
        """
        from vllm import SamplingParams

        again = self._cached
        if not self._llm.reset_prefix_cache():
            raise TrainingError(f"{where}: vLLM's prefix cache was not reset")
        if not again:
            return
        # Asking for a prompt that was in the cache shows whether anything is left of it.
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        output = self._run_alike([again], [params])[0]
        if output.num_cached_tokens:
            raise TrainingError(
                f"{where}: vLLM took {output.num_cached_tokens} tokens of a prompt from the cache "
                "of the previous weights. Report it with the output of "
                "'align doctor' and continue with sampling.engine: hf."
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """Sample ``n`` responses to each prompt; see ``RolloutEngine.generate``."""
        from vllm import SamplingParams

        check_requests(
            prompts,
            seeds=seeds,
            max_new_tokens=max_new_tokens,
            max_model_len=self.options.max_model_len,
        )
        if seeds is None:
            seeds = call_seeds(self.options.seed, self._calls, len(prompts))
        self._calls += 1
        stop = frozenset(self.options.stop_token_ids if stop_token_ids is None else stop_token_ids)
        params = [
            SamplingParams(
                n=1 if temperature == 0.0 else n,
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop_token_ids=sorted(stop),
                # Only the recipe's stop tokens end a response, not those of the model's config.
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self._run(prompts, params)
        groups = [
            [self._completion(answer, stop) for answer in sorted(o.outputs, key=lambda a: a.index)]
            for o in outputs
        ]
        # vLLM rejects n > 1 without randomness, where all n responses are the same.
        return [group * n for group in groups] if temperature == 0.0 else groups

    def token_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of tokens 1 .. T-1 at temperature 1, in nats."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        output = self._run([token_ids], [params])[0]
        return [
            output.prompt_logprobs[t][token].logprob for t, token in enumerate(token_ids) if t > 0
        ]

    def close(self) -> None:
        """Release all memory without touching the trainer's process group."""
        # vLLM would unmap sleeping memory a second time, which breaks its allocator permanently.
        self._wake()
        core = self._core_client.engine_core
        _detach_finalizer(self._core_client)
        # Delete the engine before its workers, since its compiled code references the model. Its
        # objects were frozen at start-up, which hides them from the garbage collector.
        del self._llm
        gc.unfreeze()
        gc.collect()
        if self._owns_world:
            core.shutdown()
        else:
            from vllm.distributed.parallel_state import destroy_model_parallel

            core.model_executor.shutdown()
            core.scheduler.shutdown()
            destroy_model_parallel()
        del core
        gc.collect()
        if not self._on_cpu:
            torch.cuda.empty_cache()

    @property
    def _core_client(self) -> Any:
        return self._llm.llm_engine.engine_core

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        """Return the outputs of this rank's prompts, of which there may be none."""
        # The workers of an engine must schedule the same requests in the same order.
        parts = self._group.gather((prompts, params))
        outputs = self._run_alike(
            [prompt for asked, _ in parts for prompt in asked],
            [param for _, asked in parts for param in asked],
        )
        first = sum(len(asked) for asked, _ in parts[: self._group.index])
        return outputs[first : first + len(prompts)]

    def _run_alike(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        """Return the outputs of prompts that are the same on all ranks of this engine."""
        if not prompts:
            return []
        if self.version == NO_WEIGHTS:
            raise TrainingError(
                "the vLLM engine dropped its weights when it went to sleep. "
                "Call load_weights before each round of generate."
            )
        self._wake()
        # Remembered for _forget_prefixes: a prompt that the cache may contain.
        self._cached = max(prompts, key=len)[:CACHE_PROBE]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with _keep_random_state():
            return self._llm.generate(requests, params, use_tqdm=False, lora_request=self._adapter)

    def _completion(self, answer: Any, stop: frozenset[int]) -> Completion:
        # With logprobs=0 each entry has only the sampled token.
        ids = list(answer.token_ids)
        logprobs = [entry[token].logprob for entry, token in zip(answer.logprobs, ids, strict=True)]
        return make_completion(ids, logprobs, stop=stop, decode=self._decode, version=self.version)

    def _sleep(self) -> None:
        # Level 2 drops the weights, which is correct if the trainer pushes them before each use.
        # Level 1 keeps those of model_dir in host memory, for an engine that received no push or
        # only an adapter.
        drops = self.options.always_pushed or self.version != 0
        level = 2 if drops and not self.takes_adapter else 1
        self._llm.sleep(level=level)
        self._asleep = ASLEEP
        if level == 2:
            self.version = NO_WEIGHTS

    def _wake(self, *parts: str) -> None:
        """Map the memory of these parts, or of all; nothing happens to a part that is awake."""
        tags = [tag for tag in self._asleep if not parts or tag in parts]
        if not tags:
            return
        # The trainer's cached but free blocks are invisible to vLLM's allocator.
        torch.cuda.empty_cache()
        self._asleep = tuple(tag for tag in self._asleep if tag not in tags)
        self._llm.wake_up(tags if self._asleep else [*tags, "scheduling"])


def _detach_finalizer(client: object) -> None:
    """Prevent vLLM from shutting the engine down by itself, as it does since 0.31."""
    finalizer = getattr(client, "_finalizer", None)
    if finalizer is not None:
        finalizer.detach()


@contextlib.contextmanager
def _keep_threads() -> Iterator[None]:
    """Restore ``torch.set_num_threads`` and the number afterwards.

    vLLM replaces the function with a no-op, and sets 1 thread unless OMP_NUM_THREADS is set.
    """
    set_num_threads, number = torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != number:
            set_num_threads(number)


@contextlib.contextmanager
def _keep_random_state() -> Iterator[None]:
    """Restore the trainer's random state: vLLM reseeds at start and draws while sampling."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if device is not None:
            torch.cuda.set_rng_state(device)
