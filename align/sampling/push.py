"""Push weights from the trainer to the sampler, and verify that they arrived.

There are two checks. Checksums verify that the engine has, element for element, what was sent.
Log-probabilities verify that it computes the same as the trainer, up to rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.core.errors import TrainingError
from align.sampling.checksums import Sent
from align.sampling.engine import ADAPTER, RolloutEngine
from align.sampling.rounding import ENGINE_LIMIT, excess, rounded_cache, rounded_otherwise
from align.tuning.export import full_tensor, full_weights
from align.tuning.merging import adapted_layers, adapter_parameters, merges
from align.tuning.rows import trained_rows

PUSH_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.35}
"""Largest difference of one token's log-probability, in nats, between two runs of one model."""

PROBE_TOKENS = 32
"""Number of tokens whose log-probabilities are compared after a push."""


def pushed_weights(
    module: nn.Module, *, adapter_alone: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that the sampler needs: full weights, or an adapter that cannot be merged.

    The adapter's tensors are named ``adapter.`` plus their name in ``module``.

    Args:
        module: the Hugging Face model, or what align.tuning made of it.
        adapter_alone: yield the adapter even if it could be merged, for an engine that serves it
            separately; its scale is multiplied into ``lora_B``.

    Raises:
        TrainingError: the adapter alone has rows of tokens, which engines do not take.
    """
    if merges(module) and not adapter_alone:
        yield from full_weights(module)
        return
    # Only an engine that serves the adapter alone needs the scale: merging includes it.
    if adapter_alone and trained_rows(module):
        raise TrainingError(
            "sampling.push: adapter: this adapter also trains rows of new tokens, which vLLM does "
            "not take beside a LoRA. Remove the key, and all weights are pushed"
        )
    scales = _scales(module) if adapter_alone else {}
    for name, parameter in adapter_parameters(module):
        scale = scales.get(name)
        tensor = full_tensor(parameter)
        yield f"{ADAPTER}{name}", tensor if scale is None else tensor * scale


def _scales(module: nn.Module) -> dict[str, float]:
    """Return the factor of each ``lora_B`` in the forward pass, by parameter name."""
    return {
        f"{name}.lora_B.{adapter}.weight": scale
        for name, layer in adapted_layers(module).items()
        for adapter, scale in layer.scaling.items()
    }


@dataclass(frozen=True, slots=True)
class Proof:
    """Result of the checksum comparison after a push.

    Attributes:
        same: number of tensors that the engine received element for element.
        unplaced: names of tensors without a single place in the engine, which no checksum covers.
    """

    same: int
    unplaced: tuple[str, ...]


def push(
    engine: RolloutEngine, named_tensors: Iterator[tuple[str, Tensor]], *, version: int
) -> Proof:
    """Load weights into an engine and verify that it received what was sent.

    Raises:
        TrainingError: a tensor did not arrive, or arrived changed.
    """
    sent = Sent(named_tensors, dtype=engine.dtype, device=engine.device, shares=engine.shares)
    # The engine consumes the iterator, which computes a checksum of each tensor as it passes.
    held = engine.load_weights(sent, version=version)
    if altered := sent.altered(held):
        raise TrainingError(
            f"weights version {version}: the {engine.name} engine did not receive what was sent: "
            f"{len(altered)} of {len(sent)} tensors have another checksum "
            f"({', '.join(altered[:5])}{' ...' if len(altered) > 5 else ''}). "
            "Report it with the output of 'align doctor' and continue with sampling.engine: hf."
        )
    # Tensors without a single place cannot be compared and are reported instead.
    unplaced = sent.unplaced(held)
    return Proof(len(sent) - len(unplaced), tuple(unplaced))


def probe_of(ids: Sequence[int]) -> tuple[int, ...]:
    """Return the start of a prompt, at least two tokens, since the first one is not scored."""
    return (*ids, *ids)[: min(PROBE_TOKENS, max(2, len(ids)))]


@torch.no_grad()
def probe_logprobs(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return the trainer's log-probabilities, (T - 1,), of tokens 1 .. T-1 in nats."""
    device = next(model.parameters()).device
    row = torch.tensor([list(ids)], device=device)  # (1, T)
    positions = torch.arange(row.shape[1], device=device).unsqueeze(0)
    # Index 0 has no preceding token and is 0.
    return model(row, positions).logprobs[0, 1:].float().cpu()


def measured_rounding(
    model: nn.Module,
    ids: Sequence[int],
    logprobs: Tensor,
    *,
    cache_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return how much different rounding changes ``logprobs``, token by token, in nats.

    Args:
        model: the policy. ids: the tokens. logprobs: what it computes for them.
        cache_dtype: of an engine's cache that rounds keys and values; None if it does not.
    """
    with rounded_otherwise(model), rounded_cache(model, cache_dtype):
        return (probe_logprobs(model, ids) - logprobs).abs()


def check_answers(
    engine: RolloutEngine,
    probe_ids: Sequence[int],
    *,
    logprobs: Tensor,
    rounding: Tensor,
) -> Tensor:
    """Compare the engine's log-probabilities with the trainer's, in units of rounding.

    The probabilities of given tokens depend on the embedding, every layer and the head. They reveal
    a head with different weights, which the most likely token would not. A change smaller than
    rounding is not visible here; ``push`` verifies that the weights arrived.

    Args:
        engine: the engine after ``push``.
        probe_ids: any sequence of at least two tokens.
        logprobs: the trainer's log-probabilities of tokens 1 .. T-1 of ``probe_ids`` at temperature
            1, in nats.
        rounding: how much rounding alone changes them, in nats.

    Returns:
        The difference of each token, in nats.

    Raises:
        TrainingError: the difference exceeds rounding; names the version of the weights.
    """
    assert len(probe_ids) == len(logprobs) + 1 == len(rounding) + 1, (len(probe_ids), len(logprobs))
    # (T - 1,): the first token has no log-probability.
    gap = (torch.tensor(engine.token_logprobs(probe_ids)) - logprobs).abs()
    times = excess(gap, rounding)
    if times > ENGINE_LIMIT:
        raise TrainingError(
            f"weights version {engine.version}: the {engine.name} engine and the trainer compute "
            f"different log-probabilities for the same {len(gap)} tokens: "
            f"{float(gap.mean()):.3g} nats apart on average, {times:.3g} times the effect of "
            "rounding on this model "
            f"({float(rounding.mean()):.2g}), expected at most {ENGINE_LIMIT:g} times. The "
            "engine computes something else with these weights. Report it with the output "
            "of 'align doctor' and continue with sampling.engine: hf."
        )
    return gap
