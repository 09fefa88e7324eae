"""The part of a GPU's memory that an engine may take beside what the stage holds there."""

import logging

import torch

from align.core import distributed
from align.core.errors import TrainingError

log = logging.getLogger(__name__)
GIB = 2**30
SLACK = 0.9
"""Part of the memory that is left which the engine takes: predictions are off by some percent."""
LARGEST = 0.9
"""Largest part of the whole memory that the engine takes."""
BESIDE = 1.0 * GIB
"""Buffers of the communication library and other memory that no prediction counts."""


def engine_share(held_bytes: float | None) -> float:
    """Return the fraction of this GPU's memory for the engine; the same on every rank.

    Args:
        held_bytes: memory that the stage will hold beside the engine while it samples, and that is
            not allocated yet; None is unknown, and leaves half of the free memory to it.

    Raises:
        TrainingError: nothing is left for the engine.
    """
    free, total = torch.cuda.mem_get_info()
    held = free / 2 if held_bytes is None else held_bytes
    left = free - held - BESIDE
    # The workers of one engine divide the cache alike, so the fullest GPU decides.
    share = -distributed.global_max(-min(SLACK * left / total, LARGEST))
    if share <= 0.0:
        raise TrainingError(
            f"no GPU memory is left for the rollout engine: {free / GIB:.1f} of {total / GIB:.1f} "
            f"GiB are free, and the stage will hold about {held / GIB:.1f} GiB while it "
            "samples. 'align plan' shows the parts. Use more ranks with zero.stage: 3, "
            "offload_idle: true, or set sampling.memory_frac"
        )
    log.info(
        "rollout engine: %.2f of the GPU's %.1f GiB; %.1f are free, and the stage will hold about "
        "%.1f beside it",
        *(share, total / GIB, free / GIB, held / GIB),
    )
    return share
