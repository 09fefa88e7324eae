"""The reference sampler: a plain decoding loop with a cache over a Hugging Face model."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from align.core.errors import TrainingError
from align.core.types import Completion
from align.sampling.checksums import Share, checksum
from align.sampling.engine import (
    ADAPTER,
    EngineOptions,
    call_seeds,
    check_requests,
    load_decoder,
    make_completion,
)
from align.tuning.files import with_adapter
from align.tuning.merging import base_parameters, merges
from align.tuning.wrap import add_tuner
from reward_models.scalar import exact_attention

TOKEN_BUDGET = 65_536
"""Cache positions (rows x (longest prompt + response)) of one batch."""


class HfEngine:
    """Sample with ``model.forward``; each row uses its own random generator."""

    name = "hf"
    takes_adapter = False

    def __init__(self, options: EngineOptions) -> None:
        """Load the model and its tokenizer onto this rank's device."""
        from transformers import AutoConfig, AutoModelForCausalLM

        started = time.perf_counter()
        # The sampler's log-probabilities are compared with the trainer's, so attention must be
        # exact.
        config = AutoConfig.from_pretrained(options.model_dir, trust_remote_code=False)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.model_dir,
            dtype=getattr(torch, options.dtype),
            attn_implementation=exact_attention(config),
            trust_remote_code=False,
        )
        model = with_adapter(model.to(self.device), options.model_dir)
        # The policy trains an adapter that cannot be merged: build its shape, pushes fill it.
        if options.adds_adapter:
            assert options.tuning is not None
            model = add_tuner(model, options.tuning)
        self.model = model.eval().requires_grad_(False)
        self.options = options
        # It keeps no cache between calls, and that of a call is exact.
        self.cache_dtype: torch.dtype | None = None
        self.version = 0
        self.dtype = next(iter(self._targets().values())).dtype
        self._decode = load_decoder(options.model_dir)
        self._calls = 0
        self.shares: Mapping[str, Share] = {}
        self.start_s = time.perf_counter() - started

    def awake(self) -> nullcontext[None]:
        """Do nothing: this engine keeps its only copy of the weights in place."""
        return nullcontext()

    def load_weights(
        self, named_tensors: Iterable[tuple[str, Tensor]], *, version: int
    ) -> dict[str, Tensor]:
        """Copy every weight by name into the engine's model; return checksums of all weights.
        If the policy's adapter cannot be merged, only the adapter is copied, since the rest is
        frozen.

        Raises:
            TrainingError: a weight is unknown, missing or of another shape.
        """
        # Keyed by identity: a tied weight has two names and must be set once.
        targets = self._targets()
        missing = {id(parameter): name for name, parameter in targets.items()}
        for name, tensor in named_tensors:
            target = targets.get(name)
            if target is None or target.shape != tensor.shape:
                found = "unknown" if target is None else f"{tuple(target.shape)} in the engine"
                raise TrainingError(
                    f"weights version {version}: {name} {tuple(tensor.shape)} is {found}. "
                    "The engine was built from another model."
                )
            target.copy_(tensor)
            missing.pop(id(target), None)
        # Every parameter must have been set; a tied one counts once.
        if missing:
            names = ", ".join(sorted(missing.values())[:5])
            raise TrainingError(f"weights version {version}: {len(missing)} missing ({names} ...)")
        self.version = version
        # One checksum per parameter, returned under each of its names.
        sums = {
            id(t): checksum(t.to(self.dtype)) for t in {id(t): t for t in targets.values()}.values()
        }
        return {name: sums[id(target)] for name, target in targets.items()}

    def _targets(self) -> dict[str, Tensor]:
        """Return the parameters that a push must set by name; a tied one may use either name."""
        if merges(self.model):
            return dict(self.model.named_parameters(remove_duplicate=False))
        # Only the adapter is pushed; the base never changes.
        frozen = {id(p) for p in base_parameters(self.model)}
        named = self.model.named_parameters()
        return {f"{ADAPTER}{name}": p for name, p in named if id(p) not in frozen}

    @torch.no_grad()
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
        # n rows per prompt, in order; response k has the seed + k on every engine.
        rows = [(prompt, seeds[i] + k) for i, prompt in enumerate(prompts) for k in range(n)]
        answers: list[Completion] = []
        for chunk in _chunks(rows, max_new_tokens):
            # (rows, max_new_tokens): one number for each token that may be sampled.
            uniforms = torch.stack([_uniforms(seed, max_new_tokens) for _, seed in chunk])
            tokens, logprobs = self._decode_batch(
                [prompt for prompt, _ in chunk],
                uniforms=uniforms.to(self.device),
                temperature=temperature,
                top_p=top_p,
                stop=stop,
            )
            answers += self._completions(tokens.tolist(), logprobs.tolist(), stop)
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    def token_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return log-probabilities of tokens 1 .. T-1 at temperature 1, in nats."""
        # Logits at t predict token t + 1: (1, T) -> (T - 1, V) -> (T - 1,).
        ids = torch.tensor([list(token_ids)], device=self.device)
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()

    def close(self) -> None:
        """Release all memory."""
        del self.model

    def _decode_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        uniforms: Tensor,
        temperature: float,
        top_p: float,
        stop: frozenset[int],
    ) -> tuple[Tensor, Tensor]:
        """Decode one left-padded batch until every row has stopped or reached its limit."""
        ids, mask = _left_pad(prompts, self.device)
        stops = torch.tensor(sorted(stop), device=self.device, dtype=torch.long)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        # Left padding: real tokens count from 0, padded ones get 0 and are masked.
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache, tokens, logprobs = None, [], []
        for step in range(uniforms.shape[1]):
            # One forward pass, on the whole prompts first and on one token per row afterwards.
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            token, logprob = sample(
                output.logits[:, -1], uniforms[:, step], temperature=temperature, top_p=top_p
            )
            tokens.append(token)
            logprobs.append(logprob)
            # Rows that have stopped continue until all have; _completions cuts what follows.
            done |= torch.isin(token, stops)
            if done.all():
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            # (B, T + 1): the new token is real in every row.
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        return torch.stack(tokens, 1), torch.stack(logprobs, 1)  # (B, T)

    def _completions(
        self, tokens: list[list[int]], logprobs: list[list[float]], stop: frozenset[int]
    ) -> list[Completion]:
        """Return each row as a completion, cut after its first stop token."""
        completions = []
        for ids, row_logprobs in zip(tokens, logprobs, strict=True):
            end = next((t + 1 for t, token in enumerate(ids) if token in stop), len(ids))
            completions.append(
                make_completion(
                    ids[:end],
                    row_logprobs[:end],
                    stop=stop,
                    decode=self._decode,
                    version=self.version,
                )
            )
        return completions


def sample(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at given uniform numbers.

    Args:
        logits: raw scores, (B, V).
        uniforms: numbers in [0, 1), (B,); unused at temperature 0.
        temperature: divides the logits; 0 selects the most likely token.
        top_p: sample from the smallest set of tokens with at least this probability.

    Returns:
        Token ids (B,) and their log-probabilities (B,) in float32: under the sampling distribution,
        or under the plain softmax at temperature 0.
    """
    scores = logits.float() / (temperature or 1.0)
    if temperature == 0.0:
        tokens = scores.argmax(-1)
    else:
        if top_p < 1.0:
            scores = _keep_top_p(scores, top_p)
        # float64, so that rounding in the cumulative sum cannot select a token of probability 0.
        cumulative = scores.double().softmax(-1).cumsum(-1)  # (B, V)
        target = uniforms.double()[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return tokens, scores.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def _keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    ordered, order = scores.sort(dim=-1, descending=True)
    probs = ordered.softmax(-1)
    # Drop a token if those before it already reach top_p; the most likely one always stays.
    outside = probs.cumsum(-1) - probs >= top_p
    return scores.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def _uniforms(seed: int, num: int) -> Tensor:
    """Draw the row's random numbers in advance, so that other rows cannot change them."""
    return torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _chunks(
    rows: Sequence[tuple[Sequence[int], int]], max_new_tokens: int
) -> Iterator[list[tuple[Sequence[int], int]]]:
    """Yield rows, in order, in batches within the token budget."""
    chunk: list[tuple[Sequence[int], int]] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row[0]))
        if chunk and (len(chunk) + 1) * (longest + max_new_tokens) > TOKEN_BUDGET:
            yield chunk
            chunk, longest = [], len(row[0])
        chunk.append(row)
    if chunk:
        yield chunk
