"""Predict the memory of a training stage from its recipe and its model's configuration.

All sizes are bytes of one rank: of its GPU, or of its process where it trains on the CPU. The
measurements behind the constants are in docs/scale.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from align.models import fused_head
from align.models.block_attention import BLOCK, KEEP
from align.models.saving import FILE_BYTES
from align.recipe.schema import OnlineStage, TrainingStage, ZeroSpec
from align.sampling.memory import BESIDE, LARGEST, SLACK
from align.training.deepspeed import ON_CPU, effective_stage

GIB = 2**30
LIBRARIES = {"cpu": 0.55 * GIB, "gpu": 1.0 * GIB}
"""Resident memory after the imports, or the CUDA context with NCCL (not measured)."""
RETAINED = {"cpu": 1.15, "gpu": 1.0}
"""Memory per byte in use: the C library keeps freed pieces that it cannot return."""
BUCKET, LIVE = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults: elements of the buffer that reduces gradients, and of gathered weights."""
WIDTH = {"float32": 4, "bfloat16": 2}
FOUR_BITS = 0.55
"""Bytes of a weight in 4 bits, with its scales."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The numbers of a model that decide its memory.

    Attributes:
        total: parameters. trained: those that the stage trains. largest: of the largest tensor.
        hidden, inner: width of the states and of the MLP. layers, vocab: their number.
        queries, keys: width of all query heads, and of all key heads. heads: number of query heads.
        adapted: whether the start of the stage is a model with an adapter that cannot be merged.
    """

    total: int
    trained: int
    largest: int
    hidden: int
    inner: int
    layers: int
    vocab: int
    queries: int
    keys: int
    heads: int
    adapted: bool = False


def size_of_model(config: PreTrainedConfig, *, total: int, trained: int, largest: int) -> ModelSize:
    """Return the size of a model with a transformers configuration."""
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    # A mixture runs some of its experts for a token.
    experts = getattr(text, "num_experts_per_tok", None)
    inner = experts * getattr(text, "moe_intermediate_size", inner) if experts else inner
    return ModelSize(
        total=total,
        trained=trained,
        largest=largest,
        hidden=text.hidden_size,
        inner=inner,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        queries=heads * width,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
        heads=heads,
    )


def layer_bytes(size: ModelSize, *, width: int, length: int, device: str) -> float:
    """Return what one layer keeps of a token for the backward pass.

    Args:
        size: of the model. width: bytes of a number. length: of the longest row.
        device: ``cpu`` or ``gpu``, which attend with different kernels.
    """
    # Two norms: the input in float32, and what is multiplied with the weight.
    norms = 2 * size.hidden * (4 + width)
    # Projections, the same laid out by rows, the attention's output twice.
    attention = width * (4 * size.queries + 4 * size.keys)
    if device == "gpu":
        attention += width * 2 * size.queries  # keys and values repeated for each query head
    elif length <= KEEP:
        attention += width * size.heads * (length + BLOCK) / 2  # weights up to the diagonal
    return norms + attention + width * 4 * size.inner


def activation_bytes(spec: TrainingStage, size: ModelSize, *, device: str) -> float:
    """Return what a full micro-batch keeps for its backward pass, without the head."""
    width = WIDTH[spec.dtype]
    tokens = max(spec.micro_tokens, spec.max_length) / spec.sequence_ranks
    layer = layer_bytes(size, width=width, length=spec.max_length, device=device) * tokens
    if spec.gradient_checkpointing:
        return layer + size.layers * tokens * width * size.hidden
    return layer * size.layers


def head_bytes(spec: TrainingStage, size: ModelSize, *, device: str) -> float:
    """Return what the language head needs: chunks of logits and the gradient of its weight."""
    if type(spec).new_head is not None:
        return 0.0
    width = WIDTH[spec.dtype]
    limit = fused_head.CHUNK_ELEMENTS if device == "cpu" else fused_head.CHUNK_ELEMENTS_GPU
    logits = max(spec.micro_tokens, spec.max_length) / spec.sequence_ranks * size.vocab
    kept = logits * width if logits <= fused_head.KEPT_ELEMENTS else 0
    # A chunk in the dtype of the weights, and twice in float32.
    chunk = min(logits, limit) * (width + 8)
    # The weight's gradient is summed in float32, then rounded.
    gradient = size.vocab * size.hidden * (4 + width) if spec.tuning.method == "full" else 0
    return kept + chunk + gradient


def state_bytes(
    zero: ZeroSpec,
    *,
    dtype: str,
    total: float,
    trained: int,
    ranks: int,
    device: str = "gpu",
) -> dict[str, float]:
    """Return weights, gradients and optimizer states of a trained model on one rank.

    Args:
        zero: what is sharded. dtype: of the weights.
        total: parameters, scaled where they take less than the dtype. trained: trained parameters.
        ranks: number of ranks. device: ``cpu`` or ``gpu``, whose buffers differ.
    """
    stage, width = effective_stage(zero, dtype=dtype), WIDTH[dtype]
    split = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    # Above stage 0 DeepSpeed steps a copy of the weights in float32, also of those in float32.
    master = 4 if stage else 0
    found = {
        "weights": total * width / split[0],
        "gradients": trained * 4 / split[1],
        "optimizer": trained * (8 + master) / split[2],
    }
    if zero.offload == "cpu":
        found["optimizer"] = 0.0
    bucket, live = BUCKET, LIVE
    if stage == 3 and device == "cpu":
        bucket, live = ON_CPU["reduce_bucket_size"], ON_CPU["stage3_max_live_parameters"]
    if stage:
        found["reduction buffer"] = min(trained, bucket) * width
    if stage == 3:
        found["gathered weights"] = min(total, live) * width
    return found


def step_bytes(
    spec: TrainingStage, size: ModelSize, *, ranks: int, device: str
) -> dict[str, float]:
    """Return the parts of the peak of a training step."""
    total = size.total * (FOUR_BITS / WIDTH[spec.dtype] if spec.tuning.method == "qlora" else 1.0)
    states = state_bytes(
        spec.zero, dtype=spec.dtype, total=total, trained=size.trained, ranks=ranks, device=device
    )
    return {
        **states,
        "activations": activation_bytes(spec, size, device=device),
        "head": head_bytes(spec, size, device=device),
    }


def other_models(
    spec: TrainingStage,
    size: ModelSize,
    *,
    rewards: Mapping[str, tuple[int, str]],
    ranks: int,
    device: str,
) -> dict[str, float]:
    """Return the models that an online stage has beside its policy and its engine.

    Args:
        spec: the stage. size: of its policy.
        rewards: name of each learned reward to its parameters and dtype.
        ranks: number of ranks. device: ``cpu`` or ``gpu``.
    """
    if not isinstance(spec, OnlineStage):
        return {}
    whole = size.total * WIDTH[spec.dtype]
    holders = ranks if spec.zero.stage == 3 else 1
    found: dict[str, float] = {
        name: total * WIDTH[dtype] / holders for name, (total, dtype) in rewards.items()
    }
    # With another adapter the reference is the policy with its adapter off.
    is_copied = size.adapted or spec.tuning.method in ("full", "pissa")
    if (spec.kl.coef or spec.watch is not None) and is_copied:
        is_sharded = spec.zero.stage == 3 and not size.adapted
        found["reference"] = whole / ranks if is_sharded else whole
    if spec.critic is not None:
        states = state_bytes(
            spec.zero,
            dtype=spec.dtype,
            total=size.total,
            trained=size.total,
            ranks=ranks,
            device=device,
        )
        found["critic"] = sum(states.values())
    return found


def idle_models(spec: TrainingStage, others: Mapping[str, float]) -> list[str]:
    """Return which of the other models are in CPU memory while nothing runs them.

    Models that are divided among the ranks stay on their GPUs.
    """
    if not isinstance(spec, OnlineStage) or not spec.offload_idle or spec.zero.stage == 3:
        return []
    return [name for name in others if name != "critic"]


def idle_states(
    spec: TrainingStage, size: ModelSize, states: Mapping[str, float], *, ranks: int
) -> float:
    """Return the optimizer states, also of a critic, that are in CPU memory while it samples.

    Args:
        spec: the stage. size: of its policy, and of its critic.
        states: of the policy, as ``state_bytes`` returns them. ranks: number of ranks.
    """
    if not isinstance(spec, OnlineStage) or not spec.offload_idle:
        return 0.0
    if spec.critic is None:
        return states["optimizer"]
    critic = state_bytes(
        spec.zero, dtype=spec.dtype, total=size.total, trained=size.total, ranks=ranks
    )
    return states["optimizer"] + critic["optimizer"]


def engine_bytes(
    spec: TrainingStage, size: ModelSize, *, device: str, memory: float, held: float
) -> float:
    """Return what the rollout engine of a stage takes.

    Args:
        spec: the stage. size: of its policy. device: ``cpu`` or ``gpu``.
        memory: of one GPU. held: what the stage has on the GPU while it samples.
    """
    if not isinstance(spec, OnlineStage):
        return 0.0
    sampling = spec.sampling
    # vLLM takes its share of the device, whatever the model needs of it.
    if device == "gpu" and sampling.engine != "hf":
        if sampling.memory_frac is not None:
            return sampling.memory_frac * memory
        free = memory - LIBRARIES[device]
        return max(0.0, min(SLACK * (free - held - BESIDE), LARGEST * memory))
    weights = size.total * WIDTH[spec.dtype] / sampling.tensor_parallel
    return weights + (sampling.cache_gib * GIB if sampling.engine != "hf" else 0.0)


RESTING = ("weights", "optimizer", "reduction buffer")
"""Parts of the memory of a training step that remain between two steps."""


def sampling_bytes(
    spec: TrainingStage,
    size: ModelSize,
    *,
    rewards: Mapping[str, tuple[int, str]],
    ranks: int,
    device: str = "gpu",
) -> float:
    """Return what an online stage holds beside its engine while it samples.

    Activations and gradients are gone. The weights of a push are whole one tensor at a time, and
    those of a layer are gathered for the log-probabilities that verify it.
    """
    step = step_bytes(spec, size, ranks=ranks, device=device)
    others = other_models(spec, size, rewards=rewards, ranks=ranks, device=device)
    others = {name: n for name, n in others.items() if name not in idle_models(spec, others)}
    held = sum(step.get(name, 0.0) for name in (*RESTING, "gathered weights"))
    held += sum(others.values()) + 2 * size.largest * 4
    return held - idle_states(spec, size, step, ranks=ranks)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Peaks of one rank by phase, in bytes, and the parts of the peak of a step."""

    phases: Mapping[str, float]
    parts: Mapping[str, float]

    @property
    def peak(self) -> float:
        """Return the largest peak."""
        return max(self.phases.values())


def predict(
    spec: TrainingStage,
    size: ModelSize,
    *,
    rewards: Mapping[str, tuple[int, str]],
    ranks: int,
    device: str,
    memory: float = 0.0,
) -> Prediction:
    """Predict the peak memory of one rank in each phase of a training stage.

    Args:
        spec: the stage. size: of its policy. rewards: see ``other_models``.
        ranks: number of ranks. device: ``cpu`` or ``gpu``. memory: of one GPU, in bytes.
    """
    width = WIDTH[spec.dtype]
    step = step_bytes(spec, size, ranks=ranks, device=device)
    others = other_models(spec, size, rewards=rewards, ranks=ranks, device=device)
    held = sampling_bytes(spec, size, rewards=rewards, ranks=ranks, device=device)
    engine = engine_bytes(spec, size, device=device, memory=memory, held=held)
    # Between two steps the activations, the gradients and the gathered weights are gone.
    resting = sum(step.get(name, 0.0) for name in RESTING)
    # On a GPU the engine of an online stage sleeps while others use the memory.
    sleeps = device == "gpu" and isinstance(spec, OnlineStage) and spec.sampling.engine != "hf"
    idle = sum(others[name] for name in idle_models(spec, others)) if device == "gpu" else 0.0
    beside = sum(others.values()) - idle + (0.0 if sleeps else engine)
    sharded = spec.zero.stage == 3 and spec.tuning.method == "full"
    whole = size.total * width
    used = {
        # Each is on the device once before it is moved away.
        "load": (whole / ranks if sharded else whole) + size.largest * width + beside + idle,
        "step": sum(step.values()) + beside,
    }
    if idle:
        used["scoring"] = resting + beside + max(others[n] for n in idle_models(spec, others))
    if sleeps:
        used["sampling"] = held + engine
    # On a GPU both are copied to the host.
    if device == "cpu":
        # DeepSpeed copies the states that it writes at stages 1 and 2.
        stage = effective_stage(spec.zero, dtype=spec.dtype)
        copies = step["optimizer"] if stage in (1, 2) else 0.0
        used["checkpoint"] = resting + beside + copies + step["weights"]
        # One file's weights at a time, and the tensor that is gathered.
        used["save"] = resting + beside + min(whole, FILE_BYTES + size.largest * width)
    phases = {n: LIBRARIES[device] + RETAINED[device] * used_ for n, used_ in used.items()}
    return Prediction(phases, {**step, **others, **({"engine": engine} if engine else {})})
