"""Measure whether a policy would end its responses: the probability of the stop token there."""

from collections.abc import Sequence
from statistics import median

import torch
from torch import nn

from align.core.types import Alarm, TokenRow
from align.training.batch import pack

NUM_ROWS = 16
"""Maximum number of rows that are measured."""
NEVER = 1e-3
"""Below this median probability, a policy practically never stops where it should."""


@torch.no_grad()
def stop_probabilities(
    model: nn.Module, rows: Sequence[TokenRow], stops: Sequence[int]
) -> list[float]:
    """Return the probability of the stop token at the end of each supervised response.

    Args:
        model: returns log-probabilities. rows: with the stop tokens among the trained ones.
        stops: tokens at which generation stops.
    """
    model.eval()
    found: list[float] = []
    for row in rows[:NUM_ROWS]:
        batch = pack([row])
        out = model(batch.input_ids, batch.position_ids, mask=batch.mask)
        # (1, N): the stop tokens among the trained ones.
        ends = batch.mask & torch.isin(batch.input_ids, batch.input_ids.new_tensor(list(stops)))
        found += out.logprobs[ends].float().exp().tolist()
    return found


def never_stops(probabilities: Sequence[float]) -> Alarm | None:
    """Return the alarm of a trained policy that practically never stops."""
    if not probabilities or (typical := median(probabilities)) >= NEVER:
        return None
    return Alarm(
        "never_stops",
        f"after training, the probability of the stop token at the end of {len(probabilities)} "
        f"supervised responses is {typical:.1g} (median): the policy practically never stops",
        "train longer or at a higher rate; with an adapter, use method full, or a chat_template "
        "whose stop token the model knows",
    )
