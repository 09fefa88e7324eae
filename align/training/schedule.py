"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

import math

from align.recipe.schema import OptimSpec


def learning_rate(optim: OptimSpec, step: int, total_steps: int) -> float:
    """Give the learning rate of optimiser step ``step`` (from 0) out of ``total_steps``.

    Linear warm-up over ``warmup_frac`` of the steps (step 0 already moves), then constant, linear
    or cosine decay that reaches ``min_lr_frac`` of the peak after the last step.

    ``slanted`` is ULMFiT's triangle: a linear rise from 1 / ``ratio`` of the peak over the first
    ``cut_frac`` of the steps, then a linear fall that reaches 1 / ``ratio`` after the last step.

    Reference:
        arXiv:1801.06146 eq. 3. Its fall is written as ``cut * (1 / cut_frac - 1)`` steps, which
        misses the end by what rounding ``cut`` to whole steps cuts off; here it is the rest.
    """
    if optim.schedule == "slanted":
        return optim.learning_rate * _slanted(optim, step, total_steps)
    warmup = round(optim.warmup_frac * total_steps)
    if step < warmup:
        return optim.learning_rate * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if optim.schedule == "constant":
        share = 1.0
    elif optim.schedule == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = optim.min_lr_frac
    return optim.learning_rate * (floor + (1.0 - floor) * share)


def _slanted(optim: OptimSpec, step: int, total_steps: int) -> float:
    cut = max(1, math.floor(optim.cut_frac * total_steps))
    share = step / cut if step < cut else 1.0 - (step - cut) / max(1, total_steps - cut)
    return (1.0 + max(0.0, share) * (optim.ratio - 1.0)) / optim.ratio
