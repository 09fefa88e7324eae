"""An interval for a win rate that may be looked at after every judged pair.

A fixed-size interval that is looked at until it excludes 1/2 does so in the end by chance. The
confidence sequence here covers the truth at all times together: judging may stop as soon as the
verdict is clear, and the probability of a false verdict stays below 1 - level.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from align.evaluation.stats import Interval

GRID = 1001
"""Candidate means: the bounds are exact to 0.001, rounded outwards."""
CAP = 0.5
"""Largest share of the capital that one bet may lose."""


@dataclass(slots=True)
class ConfidenceSequence:
    """Hold a hedged capital process for the mean of independent values in [0, 1].

    Two gamblers bet for each candidate mean that the truth is higher, or lower. Against the true
    mean neither can expect to win, so by Ville's inequality the capital reaches 1 / alpha with
    probability at most alpha; a candidate against which it has is excluded for good.

    Attributes:
        level: confidence over all times together, in (0, 1).

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
        """Take one more value in [0, 1] into account."""
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"value {value}, expected a number in [0, 1]")
        means = np.linspace(0.0, 1.0, GRID)
        bet = self._bet()
        with np.errstate(divide="ignore"):
            up = np.minimum(bet, CAP / means)
            down = np.minimum(bet, CAP / (1.0 - means))
        self._log_up += np.log1p(up * (value - means))
        self._log_down += np.log1p(-down * (value - means))
        self._observe(value)
        # Each gambler holds half of the capital at the start.
        capital = np.maximum(self._log_up, self._log_down) - np.log(2.0)
        self._alive &= capital < -np.log(1.0 - self.level)

    def _bet(self) -> float:
        """Give the bet on the next value from the values before it."""
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
        """Give the mean so far with the bounds that hold at all times together."""
        value = self._sum / self.count if self.count else float("nan")
        alive = np.flatnonzero(self._alive)
        if not alive.size:  # values that are not independent of one another can exclude every mean
            return Interval(value, float("nan"), float("nan"))
        step = 1.0 / (GRID - 1)
        low, high = (alive[0] - 1) * step, (alive[-1] + 1) * step
        return Interval(value, max(0.0, float(low)), min(1.0, float(high)))

    @property
    def verdict(self) -> str:
        """Say ``better``, ``worse`` or ``not shown`` of the mean against 1/2."""
        bounds = self.interval
        if bounds.low > 0.5:
            return "better"
        return "worse" if bounds.high < 0.5 else "not shown"
