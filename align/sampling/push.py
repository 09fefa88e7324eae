"""From trainer to sampler: weights under checkpoint names, and the proof of their arrival.

Two checks answer two questions. Checksums: does the engine hold, element for element, what was
sent? Log-probabilities: does it compute with them what the trainer computes, but for rounding?
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from align.core.errors import TrainingError
from align.sampling.checksums import Sent
from align.sampling.engine import ADAPTER, RolloutEngine
from align.sampling.rounding import ENGINE_LIMIT, excess, rounded_otherwise
from align.tuning.export import full_tensor, full_weights
from align.tuning.merging import adapted_layers, adapter_parameters, merges

PUSH_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.35}
"""Largest difference of one token's log-probability, in nats, between two runs of one model."""

PROBE_TOKENS = 48
"""Tokens whose log-probabilities are compared after a push."""


def pushed_weights(
    module: nn.Module, *, adapter_alone: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield what the sampler needs: full weights or, of an adapter that cannot merge, itself.

    The adapter's tensors are named ``adapter.`` and their name in ``module``.

    Args:
        module: the Hugging Face model or what align.tuning made of it.
        adapter_alone: yield the adapter although it could be merged, for an engine that serves
            it beside the weights; its scale is multiplied into ``lora_B``.
    """
    if merges(module) and not adapter_alone:
        yield from full_weights(module)
        return
    scales = _scales(module) if adapter_alone else {}
    for name, parameter in adapter_parameters(module):
        scale = scales.get(name)
        tensor = full_tensor(parameter)
        yield f"{ADAPTER}{name}", tensor if scale is None else tensor * scale


def _scales(module: nn.Module) -> dict[str, float]:
    """Return by what each ``lora_B`` is multiplied in the forward pass, by parameter name."""
    return {
        f"{name}.lora_B.{adapter}.weight": scale
        for name, layer in adapted_layers(module).items()
        for adapter, scale in layer.scaling.items()
    }


@dataclass(frozen=True, slots=True)
class Proof:
    """What the checksums of a push covered.

    Attributes:
        same: tensors that the engine holds element for element as they were sent.
        unplaced: names of tensors for which the engine has no one place, so that no checksum
            speaks for them.
    """

    same: int
    unplaced: tuple[str, ...]


def push(
    engine: RolloutEngine, named_tensors: Iterator[tuple[str, Tensor]], *, version: int
) -> Proof:
    """Load weights into an engine and prove that it holds what was sent.

    Raises:
        TrainingError: a tensor did not arrive, or not as it was sent.
    """
    sent = Sent(named_tensors, dtype=engine.dtype, device=engine.device)
    held = engine.load_weights(sent, version=version)
    if altered := sent.altered(held):
        raise TrainingError(
            f"weights version {version}: the {engine.name} engine does not hold what was sent: "
            f"{len(altered)} of {len(sent)} tensors have another checksum "
            f"({', '.join(altered[:5])}{' ...' if len(altered) > 5 else ''}); "
            "report it with the library versions of 'align doctor', go on with sampling.engine: hf"
        )
    unplaced = sent.unplaced(held)
    return Proof(len(sent) - len(unplaced), tuple(unplaced))


def probe_of(ids: Sequence[int]) -> tuple[int, ...]:
    """Return the start of a prompt, two tokens at least: one alone has nothing to be scored."""
    return (*ids, *ids)[: min(PROBE_TOKENS, max(2, len(ids)))]


@torch.no_grad()
def probe_logprobs(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """Return the trainer's log-probabilities, (T - 1,), of tokens 1 .. T-1 in nats."""
    device = next(model.parameters()).device
    row = torch.tensor([list(ids)], device=device)  # (1, T)
    positions = torch.arange(row.shape[1], device=device).unsqueeze(0)
    return model(row, positions).logprobs[0, 1:].float().cpu()


def measured_rounding(model: nn.Module, ids: Sequence[int], logprobs: Tensor) -> Tensor:
    """Return by how much other rounding moves ``logprobs``, token by token, in nats."""
    with rounded_otherwise(model):
        return (probe_logprobs(model, ids) - logprobs).abs()


def check_answers(
    engine: RolloutEngine,
    probe_ids: Sequence[int],
    logprobs: Tensor,
    rounding: Tensor,
) -> Tensor:
    """Compare the engine's log-probabilities with the trainer's, in units of rounding.

    The probabilities of given tokens pass through the embedding, every layer and the head, so a
    head of other weights shows, which the most likely token would not. A change smaller than
    rounding cannot show here: that weights arrived at all is what ``push`` proves.

    Args:
        engine: the engine after ``push``.
        probe_ids: any token sequence of two tokens or more.
        logprobs: the trainer's, temperature 1, of tokens 1 .. T-1 of ``probe_ids``, in nats.
        rounding: how far rounding alone moves them, in nats.

    Returns:
        The difference of each token, in nats.

    Raises:
        TrainingError: the difference is more than rounding explains; names the weights' version.
    """
    assert len(probe_ids) == len(logprobs) + 1 == len(rounding) + 1, (len(probe_ids), len(logprobs))
    gap = (torch.tensor(engine.token_logprobs(probe_ids)) - logprobs).abs()
    times = excess(gap, rounding)
    if times > ENGINE_LIMIT:
        raise TrainingError(
            f"weights version {engine.version}: the {engine.name} engine and the trainer give "
            f"other log-probabilities to the same {len(gap)} tokens: {float(gap.mean()):.3g} nats "
            f"apart on average, {times:.3g} times what rounding does to this model "
            f"({float(rounding.mean()):.2g}), expected at most {ENGINE_LIMIT:g} times; the "
            "engine computes something else with these weights (report it with the library "
            "versions of 'align doctor', go on with sampling.engine: hf)"
        )
    return gap
