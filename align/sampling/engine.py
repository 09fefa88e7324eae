"""The rollout engine: what every sampler can do, which one is chosen, and the checks they share."""

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
from align.tuning.files import unmerged_adapter

log = logging.getLogger(__name__)

ADAPTER = "adapter."
"""Before the names of an adapter's own tensors in a push."""


class RolloutEngine(Protocol):
    """Sample answers from the current policy and say how likely each token was.

    Attributes:
        name: ``"vllm"`` or ``"hf"``.
        takes_adapter: True where a push is the policy's adapter alone, not whole weights.
        version: version number of the weights that answer now; 0 are the ones in ``model_dir``.
        dtype: number format of its weights. device: where it holds them.
        start_s: seconds from the call of the constructor to the ready engine.
    """

    name: str
    takes_adapter: bool
    version: int
    dtype: torch.dtype
    device: torch.device
    start_s: float

    def awake(self) -> AbstractContextManager[None]:
        """Hold the accelerator's memory inside the block and give it back after it."""
        ...

    def load_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int
    ) -> Mapping[str, Tensor]:
        """Replace all weights; names and layout as in a Hugging Face checkpoint.

        Where ``takes_adapter``, all of the adapter; names as in align.sampling.push, whose
        ``push`` calls this and compares.

        Returns:
            For each place that a checkpoint's tensor has in the engine, by the tensor's name, the
            checksum of what stands there now.
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
        """Sample ``n`` answers to each prompt, in the order of the prompts.

        Args:
            prompts: token ids of each prompt.
            n: answers per prompt.
            max_new_tokens: limit of each answer, in tokens.
            temperature: divides the logits; 0 takes the most likely token each time.
            top_p: smallest set of tokens with at least this probability that is drawn from.
            seeds: one per prompt; answer k of a prompt draws with seed + k. None derives them
                from the engine's seed and the number of calls so far.
            stop_token_ids: tokens that end an answer; None takes those given at construction.

        Returns:
            For each prompt its ``n`` completions. Log-probabilities are of the distribution that
            was drawn from (after temperature and top_p); for temperature 0 of the plain softmax.

        Raises:
            DataError: a prompt is empty, or does not fit the engine together with its answer.
        """
        ...

    def token_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Score tokens 1 .. T-1 of a sequence with the current weights, temperature 1, in nats."""
        ...

    def close(self) -> None:
        """Give all memory back; the engine cannot be used any more."""
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Hold what both engines are built from.

    Attributes:
        model_dir: Hugging Face model folder with its tokenizer.
        dtype: ``"float32"`` or ``"bfloat16"``.
        max_model_len: prompt and answer together, in tokens.
        seed: source of the seeds of calls that name none.
        memory_frac: share of the accelerator's memory for weights and cache.
        cache_gib: key-value cache on CPU, in GiB.
        stop_token_ids: tokens that end an answer unless a call says otherwise.
        tuning: how the policy that will be pushed is tuned; None for a policy that is not trained.
        push: what of it vLLM is given, whole weights or the adapter alone.
    """

    model_dir: Path
    dtype: Literal["float32", "bfloat16"]
    max_model_len: int
    seed: int
    memory_frac: float
    cache_gib: float
    stop_token_ids: tuple[int, ...]
    tuning: TuningSpec | None = None
    push: Literal["merged", "adapter"] = "merged"

    @property
    def adds_adapter(self) -> bool:
        """Say whether an adapter that cannot be merged is added to what is in ``model_dir``."""
        tuned = self.tuning is not None and not self.tuning.merges
        return tuned and unmerged_adapter(self.model_dir) is None


def check_requests(
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int] | None,
    max_new_tokens: int,
    max_model_len: int,
) -> None:
    """Refuse prompts that cannot be answered in full.

    Raises:
        DataError: a prompt is empty or too long for the engine together with its answer.
    """
    assert seeds is None or len(seeds) == len(prompts), (len(seeds or ()), len(prompts))
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {i} of the batch has no tokens; remove the empty prompt")
        if len(prompt) + max_new_tokens > max_model_len:
            raise DataError(
                f"prompt {i} of the batch has {len(prompt)} tokens, with max_new_tokens "
                f"{max_new_tokens} more than the engine's {max_model_len}; "
                "lower max_new_tokens, raise max_length or leave the prompt out"
            )


def call_seeds(seed: int, call: int, num_prompts: int) -> list[int]:
    """Derive the seeds of a call that names none, so that no two calls draw alike."""
    return [derive_seed(seed, "engine", call, i) for i in range(num_prompts)]


def load_decoder(model_dir: Path) -> Callable[[Sequence[int]], str]:
    """Load the model's tokenizer as a function from answer tokens to text.

    Special tokens that were sampled stay in the text, as tags of thought or tools; padding goes.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)

    def decode(ids: Sequence[int]) -> str:
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
    """Make a completion; the stop token stays in the tokens and out of the text."""
    stopped = ids[-1] in stop
    return Completion(
        token_ids=tuple(ids),
        logprobs=tuple(logprobs),
        finish_reason="stop" if stopped else "length",
        # The stop token may be an ordinary word of the vocabulary, which skipping special
        # tokens would leave in the text.
        text=decode(ids[:-1] if stopped else ids),
        weights_version=version,
    )
