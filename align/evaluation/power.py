"""How many prompts it takes to see a difference, from the spread that was measured."""

from math import ceil
from statistics import NormalDist


def _reach(level: float, power: float) -> float:
    if not (0.0 < level < 1.0 and 0.0 < power < 1.0):
        raise ValueError(f"level {level}, power {power}: expected both in (0, 1)")
    normal = NormalDist()
    return normal.inv_cdf(0.5 + level / 2.0) + normal.inv_cdf(power)


def prompts_needed(
    difference: float,
    *,
    standard_error: float,
    num_prompts: int,
    level: float = 0.95,
    power: float = 0.8,
) -> int | None:
    """Give the number of prompts at which a true difference is shown with probability ``power``.

    The spread over prompts is taken to be that of the ones measured, with as many answers each.

    Args:
        difference: true distance from "no difference", in the unit of the metric.
        standard_error: of the metric on the prompts measured.
        num_prompts: how many those were.
        level: confidence of the interval that must exclude "no difference".
        power: chance that it does.

    Returns:
        The number; None for a difference of 0, which no number shows.
    """
    if difference == 0.0:
        return None
    deviation = standard_error * num_prompts**0.5
    return max(2, ceil((_reach(level, power) * deviation / difference) ** 2))


def smallest_difference(*, standard_error: float, level: float = 0.95, power: float = 0.8) -> float:
    """Give the true difference that this many prompts show with probability ``power``."""
    return _reach(level, power) * standard_error
