"""Which responses of a rank belong to a mini-batch of all ranks."""

import math
import random

from align.sampling.rollout import Experience


def mini_batches(
    experience: Experience, num: int, *, num_prompts: int, seed: int | None
) -> list[list[int]]:
    """Return this rank's rows of each mini-batch of an epoch.

    The prompts of all ranks are divided, so that a mini-batch has the same prompts with any number
    of ranks.

    Args:
        experience: this rank's responses; ``group_ids`` are numbers of prompts over all ranks.
        num: number of mini-batches.
        num_prompts: number of prompts of the step, over all ranks.
        seed: shuffles the prompts, so that others share a mini-batch; None keeps their order,
            which is already random.

    Returns:
        Always ``num`` lists, of which some may be empty: all ranks take part in every mini-batch.
    """
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(experience.group_ids.tolist()):
        groups.setdefault(group, []).append(row)
    assert max(groups, default=-1) < num_prompts, (sorted(groups), num_prompts)
    order = list(range(num_prompts))
    if seed is not None and num > 1:
        random.Random(seed).shuffle(order)
    # The last mini-batch is smaller if the prompts do not divide evenly.
    size = math.ceil(num_prompts / num)
    return [
        [row for group in order[i * size : (i + 1) * size] for row in groups.get(group, ())]
        for i in range(num)
    ]
