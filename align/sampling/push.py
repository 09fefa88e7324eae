"""From trainer to sampler: full weights under checkpoint names, and the proof of arrival."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor, nn

from align.core.errors import TrainingError
from align.sampling.engine import ADAPTER, RolloutEngine
from align.tuning.export import full_tensor, full_weights
from align.tuning.merging import (
    adapter_parameters,
    merges,
)

PUSH_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.35}
"""Largest difference of one token's log-probability, in nats, between engine and trainer."""


def pushed_weights(
    module: nn.Module, *, adapter_alone: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield what the sampler needs: full weights or, of an adapter that cannot merge, itself.

    The adapter's tensors are named ``adapter.`` and their name in ``module``.

    Args:
        module: the Hugging Face model or what align.tuning made of it.
        adapter_alone: yield the adapter although it could be merged.
    """
    if merges(module) and not adapter_alone:
        yield from full_weights(module)
        return
    for name, parameter in adapter_parameters(module):
        yield f"{ADAPTER}{name}", full_tensor(parameter)


def check_push(
    engine: RolloutEngine,
    probe_ids: Sequence[int],
    trainer_logprobs: Sequence[float],
    *,
    dtype: Literal["float32", "bfloat16"],
) -> float:
    """Prove that the engine answers with the trainer's weights.

    The probabilities of given tokens pass through the embedding, every layer and the head, so a
    head that stayed on old weights shows, which the most likely token would not.

    Args:
        engine: the engine after ``load_weights``.
        probe_ids: any token sequence of two tokens or more.
        trainer_logprobs: the trainer's log-probabilities, temperature 1, of the last
            ``len(trainer_logprobs)`` tokens of ``probe_ids``, in nats.
        dtype: number format of engine and trainer; sets the bound.

    Returns:
        The largest difference found, in nats.

    Raises:
        TrainingError: the engine's numbers are not the trainer's; names the weights' version.
    """
    assert 0 < len(trainer_logprobs) < len(probe_ids), (len(trainer_logprobs), len(probe_ids))
    found = engine.token_logprobs(probe_ids)[-len(trainer_logprobs) :]
    differences = [abs(a - b) for a, b in zip(found, trainer_logprobs, strict=True)]
    # max() would pass over a NaN that is not the first.
    worst = max(d if math.isfinite(d) else math.inf for d in differences)
    bound = PUSH_TOLERANCE[dtype]
    if worst > bound:
        raise TrainingError(
            f"weights version {engine.version}: the {engine.name} engine does not answer with the "
            f"trainer's weights: log-probabilities differ by {worst:.4g} nats, expected at most "
            f"{bound} in {dtype}; the push did not reach every layer (report it with the library "
            "versions of 'align doctor', go on with sampling.engine: hf)"
        )
    return worst
