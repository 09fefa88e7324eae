"""A confidence interval of a win rate that may be checked after every judged pair.

A fixed-size interval that is checked until it excludes 1/2 eventually does so by chance. The
confidence sequence here covers the true mean at all times simultaneously: judging may stop as soon
as the verdict is clear, and the probability of a false verdict stays below 1 - level.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from align.core.types import NO_DIFFERENCE
from align.evaluation.stats import Interval

GRID = 1001
"""Number of candidate means: the bounds are exact to 0.001, rounded outwards."""
CAP = 0.5
"""Largest fraction of the capital that one bet may lose."""


@dataclass(slots=True)
class ConfidenceSequence:
    """A hedged capital process for the mean of independent values in [0, 1].

    For each candidate mean, one gambler bets that the true mean is higher and another that it is
    lower. Against the true mean neither can expect to win, so by Ville's inequality their capital
    reaches 1 / alpha with probability at most alpha. A candidate is excluded for good once the
    capital against it reaches that value.

    Attributes:
        level: confidence over all times simultaneously, in (0, 1).
        count: number of values so far.

    Reference:
        Waudby-Smith and Ramdas, arXiv:2010.09686 theorem 3 (hedged capital), with the predictable
        bets of its eq. 26.
    """

    level: float = 0.95
    count: int = 0
    _sum: float = 0.0
    _squares: float = 0.0
    _log_up: NDArray[np.float64] = field(default_factory=lambda: np.zeros(GRID))
    _log_down: NDArray[np.float64] = field(default_factory=lambda: np.zeros(GRID))
    _alive: NDArray[np.bool_] = field(default_factory=lambda: np.ones(GRID, dtype=bool))

    def update(self, value: float) -> None:
        """Add one value in [0, 1].

        Raises:
            ValueError: the value is outside [0, 1].
        """
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"value {value}, expected a number in [0, 1]")
        means = np.linspace(0.0, 1.0, GRID)  # (GRID,)
        # The bet must not depend on the value itself: it is computed before `_observe`.
        bet = self._bet()
        with np.errstate(divide="ignore"):
            up = np.minimum(bet, CAP / means)
            down = np.minimum(bet, CAP / (1.0 - means))
        self._log_up += np.log1p(up * (value - means))
        self._log_down += np.log1p(-down * (value - means))
        self._observe(value)
        # Each gambler starts with half of the capital.
        capital = np.maximum(self._log_up, self._log_down) - np.log(2.0)
        self._alive &= capital < -np.log(1.0 - self.level)

    def _bet(self) -> float:
        """Return the bet on the next value, computed from the values before it (eq. 26)."""
        t = self.count + 1
        variance = (0.25 + self._squares) / t
        budget = 2.0 * np.log(2.0 / (1.0 - self.level))
        return float(np.sqrt(budget / (variance * t * np.log(t + 1.0))))

    def _observe(self, value: float) -> None:
        self.count += 1
        self._sum += value
        mean = (0.5 + self._sum) / (self.count + 1)
        self._squares += (value - mean) ** 2

    @property
    def interval(self) -> Interval:
        """Return the mean so far with bounds that are valid at all times simultaneously."""
        value = self._sum / self.count if self.count else float("nan")
        alive = np.flatnonzero(self._alive)
        if not alive.size:  # Only dependent values can exclude every candidate mean.
            return Interval(value, float("nan"), float("nan"))
        step = 1.0 / (GRID - 1)
        low, high = (alive[0] - 1) * step, (alive[-1] + 1) * step
        return Interval(value, max(0.0, float(low)), min(1.0, float(high)))

    @property
    def verdict(self) -> str:
        """Return whether the mean is above 1/2: ``better``, ``worse`` or ``NO_DIFFERENCE``."""
        bounds = self.interval
        if bounds.low > 0.5:
            return "better"
        return "worse" if bounds.high < 0.5 else NO_DIFFERENCE
