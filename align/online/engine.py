"""The rollout engine: what every sampler can do, which one is chosen, and the checks they share."""

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from align.core.distributed import derive_seed
from align.core.errors import DataError, TrainingError
from align.core.types import Completion
from align.recipe.tuning_schema import UNMERGED, TuningSpec
from align.tuning.files import unmerged_adapter

log = logging.getLogger(__name__)

ADAPTER = "adapter."
"""Before the names of an adapter's own tensors in a push."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes for which vLLM's CPU attention is built (vllm 0.31, ``cpu_attn.py``)."""


class RolloutEngine(Protocol):
    """Sample answers from the current policy and say how likely each token was.

    Attributes:
        name: ``"vllm"`` or ``"hf"``.
        takes_adapter: True where a push is the policy's adapter alone, not whole weights.
        version: version number of the weights that answer now; 0 are the ones in ``model_dir``.
        start_s: seconds from the call of the constructor to the ready engine.
    """

    name: str
    takes_adapter: bool
    version: int
    start_s: float

    def awake(self) -> AbstractContextManager[None]:
        """Hold the accelerator's memory inside the block and give it back after it."""
        ...

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]], *, version: int) -> None:
        """Replace all weights; names and layout as in a Hugging Face checkpoint.

        Where ``takes_adapter``, all of the adapter; names as in align.online.weights.
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
        tuned = self.tuning is not None and self.tuning.method in UNMERGED
        return tuned and unmerged_adapter(self.model_dir) is None


def build_engine(
    kind: Literal["auto", "vllm", "hf"],
    model_dir: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_model_len: int = 1024,
    seed: int = 0,
    memory_frac: float = 0.3,
    cache_gib: float = 0.5,
    stop_token_ids: Sequence[int] = (),
    tuning: TuningSpec | None = None,
    push: Literal["merged", "adapter"] = "merged",
) -> RolloutEngine:
    """Build the engine that a recipe asks for and log the choice in one line.

    Under several ranks every rank must call this at the same point: vLLM makes process groups.

    Args:
        kind: ``auto`` takes vLLM wherever it can serve this model and says why when it cannot.
        model_dir: Hugging Face model folder with its tokenizer.
        dtype: number format of the engine's weights.
        max_model_len: prompt and answer together, in tokens; never more than the model's positions.
        seed: source of the seeds of calls that name none.
        memory_frac: share of the accelerator's memory for weights and cache.
        cache_gib: key-value cache on CPU, in GiB.
        stop_token_ids: tokens that end an answer unless a call says otherwise.
        tuning: the block of the stage whose policy will be pushed; None without training.
        push: ``adapter`` lets vLLM serve the LoRA of ``tuning`` beside the weights it starts with.

    Raises:
        TrainingError: vLLM was asked for by name and cannot serve this model.
    """
    positions = _read_config(Path(model_dir)).get("max_position_embeddings") or max_model_len
    options = EngineOptions(
        model_dir=Path(model_dir),
        dtype=dtype,
        max_model_len=min(max_model_len, positions),
        seed=seed,
        memory_frac=memory_frac,
        cache_gib=cache_gib,
        stop_token_ids=tuple(stop_token_ids),
        tuning=tuning,
        push=push,
    )
    name, reason = choose_engine(kind, options.model_dir, tuning)
    if name == "vllm":
        from align.online.engine_vllm import VllmEngine as Engine
    else:
        from align.online.engine_hf import HfEngine as Engine
    engine = Engine(options)
    log.info(
        "rollout engine: %s (%s); %s, up to %d tokens, ready in %.1f s",
        *(name, reason, dtype, options.max_model_len, engine.start_s),
    )
    return engine


def choose_engine(
    kind: Literal["auto", "vllm", "hf"], model_dir: str | Path, tuning: TuningSpec | None = None
) -> tuple[Literal["vllm", "hf"], str]:
    """Choose the engine for a model without importing vLLM.

    Returns:
        The engine's name and the reason in words.

    Raises:
        TrainingError: vLLM was asked for by name and cannot serve this model.
    """
    if kind == "hf":
        return "hf", "asked for by the recipe"
    obstacle = adapter_obstacle(model_dir, tuning) or vllm_obstacle(model_dir)
    if obstacle is None:
        return "vllm", "asked for by the recipe" if kind == "vllm" else "installed, fits the model"
    if kind == "vllm":
        raise TrainingError(
            f"sampling.engine: vllm cannot serve {model_dir}: {obstacle}; "
            "use engine: hf (or auto), or a model that vLLM takes"
        )
    return "hf", f"vllm cannot serve this model: {obstacle}"


def adapter_obstacle(model_dir: str | Path, tuning: TuningSpec | None) -> str | None:
    """Say why vLLM cannot hold the policy's adapter, or None where it has none that matters."""
    found = unmerged_adapter(model_dir)
    method = found[1] if found is not None else tuning.method if tuning is not None else "full"
    if method not in UNMERGED:
        return None
    return f"its {method} adapter cannot be merged into the weights that vLLM takes"


def vllm_obstacle(model_dir: str | Path) -> str | None:
    """Say why vLLM cannot serve a model here, or None when nothing is known against it."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    config = _read_config(Path(model_dir))
    if torch.cuda.is_available():
        return None
    head_size = _head_size(config)
    if head_size is not None and head_size not in CPU_HEAD_SIZES:
        allowed = ", ".join(map(str, CPU_HEAD_SIZES))
        return f"head size {head_size} is not among those of its CPU attention ({allowed})"
    return None


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise TrainingError(
            f"{path}: cannot be read as a model configuration ({error}); "
            "give the folder of a saved Hugging Face model"
        ) from error


def _head_size(config: dict[str, Any]) -> int | None:
    if config.get("head_dim"):
        return int(config["head_dim"])
    if config.get("hidden_size") and config.get("num_attention_heads"):
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return None


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
    """Load the model's tokenizer as a function from answer tokens to text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

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
