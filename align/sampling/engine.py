"""The rollout engine interface, its options, and checks shared by all engines."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from align.core.distributed import derive_seed
from align.core.errors import DataError
from align.core.types import Completion
from align.recipe.schema.tuning import TuningSpec
from align.sampling.checksums import Share
from align.tuning.files import unmerged_adapter

log = logging.getLogger(__name__)

ADAPTER = "adapter."
"""Prefix of the names of an adapter's own tensors in a push."""

CACHE_DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""Dtypes of key-value caches that round what they keep, by their names in a recipe."""


class RolloutEngine(Protocol):
    """Sample responses from the current policy with the log-probability of each token.

    Attributes:
        name: ``"vllm"`` or ``"hf"``.
        takes_adapter: True if a push contains only the policy's adapter, not whole weights.
        version: version of the current weights; 0 means those in ``model_dir``.
        dtype: dtype of its weights.
        device: device of its weights.
        start_s: seconds from the constructor call until the engine is ready.
        shares: by name, the part of a saved tensor that this rank has; it has the others whole.
        cache_dtype: of the key-value cache if it rounds keys and values; None if it does not.

    With ``tensor_parallel`` ranks for an engine, all of them must make the same calls in the same
    order, each with prompts of its own.
    """

    name: str
    takes_adapter: bool
    version: int
    dtype: torch.dtype
    device: torch.device
    start_s: float
    shares: Mapping[str, Share]
    cache_dtype: torch.dtype | None

    def awake(self) -> AbstractContextManager[None]:
        """Use the accelerator's memory inside the block and release it afterwards."""
        ...

    def load_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int
    ) -> Mapping[str, Tensor]:
        """Replace all weights; names and layout are those of a Hugging Face model.

        If ``takes_adapter``, the whole adapter is replaced, with names as in align.sampling.push,
        whose ``push`` calls this method and compares the checksums.

        Returns:
            The checksum of the engine's data in each place of a saved tensor, by tensor name.
        """
        ...

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
        """Sample ``n`` responses to each prompt, in the order of the prompts.

        Args:
            prompts: token ids of each prompt.
            n: responses per prompt.
            max_new_tokens: limit of each response, in tokens.
            temperature: divides the logits; 0 selects the most likely token each time.
            top_p: sample from the smallest set of tokens with at least this probability.
            seeds: one per prompt; response k of a prompt uses seed + k. None derives them from the
                engine's seed and the number of previous calls.
            stop_token_ids: tokens that end a response; None uses those given at construction.

        Returns:
            ``n`` completions for each prompt. Log-probabilities refer to the sampling distribution
            (after temperature and top_p), or to the plain softmax for temperature 0.

        Raises:
            DataError: a prompt is empty, or prompt and response together exceed the engine's limit.
        """
        ...

    def token_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of tokens 1 .. T-1 at temperature 1, in nats."""
        ...

    def close(self) -> None:
        """Release all memory; the engine cannot be used afterwards."""
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Options shared by both engines.

    Attributes:
        model_dir: Hugging Face model folder with its tokenizer.
        dtype: ``"float32"`` or ``"bfloat16"``.
        max_model_len: prompt and response together, in tokens.
        seed: source of the seeds of calls without explicit seeds.
        memory_frac: fraction of the accelerator's memory for weights and cache; None computes it.
        held_bytes: memory that the stage will hold there beside the engine; None is unknown.
        cache_gib: key-value cache on CPU, in GiB.
        stop_token_ids: tokens that end a response unless a call overrides them.
        tuning: how the pushed policy is tuned; None for a policy that is not trained.
        push: what is pushed to vLLM, whole weights or only the adapter.
        tensor_parallel: ranks that share one engine.
        max_num_seqs: responses that vLLM decodes at the same time; None for its default.
        cache_dtype: of vLLM's key-value cache; ``auto`` is that of the weights.
        always_pushed: each use of the engine follows a push, so its own weights may be dropped.
    """

    model_dir: Path
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: int = 1024
    seed: int = 0
    memory_frac: float | None = None
    cache_gib: float = 0.5
    stop_token_ids: Sequence[int] = ()
    tuning: TuningSpec | None = None
    push: Literal["merged", "adapter"] = "merged"
    tensor_parallel: int = 1
    max_num_seqs: int | None = None
    cache_dtype: Literal["auto", "fp8", "fp8_e5m2"] = "auto"
    held_bytes: float | None = None
    always_pushed: bool = False

    @property
    def rounded_cache(self) -> torch.dtype | None:
        """Return the dtype to which the cache rounds keys and values, or None."""
        return CACHE_DTYPES.get(self.cache_dtype)

    @property
    def adds_adapter(self) -> bool:
        """Return whether an unmergeable adapter is added to the model in ``model_dir``."""
        tuned = self.tuning is not None and not self.tuning.merges
        return tuned and unmerged_adapter(self.model_dir) is None


def check_requests(
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int] | None,
    max_new_tokens: int,
    max_model_len: int,
) -> None:
    """Raise if a prompt leaves too little room for a response.

    Raises:
        DataError: a prompt is empty, or prompt and response together exceed the engine's limit.
    """
    # Reject the whole batch before anything is sampled: engines would truncate or fail halfway.
    assert seeds is None or len(seeds) == len(prompts), (len(seeds or ()), len(prompts))
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {i} of the batch has no tokens. Remove the empty prompt.")
        if len(prompt) + max_new_tokens > max_model_len:
            raise DataError(
                f"prompt {i} of the batch has {len(prompt)} tokens; with max_new_tokens "
                f"{max_new_tokens}, this exceeds the engine's {max_model_len}. "
                "Lower max_new_tokens, raise max_length or remove the prompt."
            )


def call_seeds(seed: int, call: int, num_prompts: int) -> list[int]:
    """Derive the seeds of a call without explicit seeds, so that no two calls are alike."""
    return [derive_seed(seed, "engine", call, i) for i in range(num_prompts)]


def load_decoder(model_dir: Path) -> Callable[[Sequence[int]], str]:
    """Return a function that decodes response tokens to text with the model's tokenizer.

    Sampled special tokens stay in the text, such as tags of reasoning or tools; padding is removed.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)

    def decode(ids: Sequence[int]) -> str:
        # Not skip_special_tokens: it would also remove tags that rewards look for, such as
        # </think>.
        kept = [i for i in ids if i != tokenizer.pad_token_id]
        return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return decode


def make_completion(
    ids: Sequence[int],
    logprobs: Sequence[float],
    *,
    stop: frozenset[int],
    decode: Callable[[Sequence[int]], str],
    version: int,
) -> Completion:
    """Return a completion; the stop token is part of the tokens but not of the text."""
    # A response always has at least one token: max_new_tokens is positive.
    stopped = ids[-1] in stop
    return Completion(
        token_ids=tuple(ids),
        logprobs=tuple(logprobs),
        finish_reason="stop" if stopped else "length",
        # The stop token may be an ordinary word of the vocabulary, so it is removed by position.
        text=decode(ids[:-1] if stopped else ids),
        weights_version=version,
    )
