"""What a check is: a name and a function that gives a finding; and how a list of them is run."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from align.core.card import Line
from align.core.errors import AlignError
from align.core.types import Example

Item = TypeVar("Item")
MAX_SEEN = 32
"""Examples that are kept of those rendered, at most."""
Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Hold what a check found: the measured value, its bound, the verdict, and what to do."""

    value: str
    bound: str = ""
    verdict: Verdict = "ok"
    remedy: str = ""


Check = tuple[str, Callable[[], Finding]]


def examine(checks: Iterable[Check]) -> list[Line]:
    """Run checks one after the other; one that ends in an error of the user's is a failed line."""
    lines = []
    for name, check in checks:
        began = time.monotonic()
        try:
            found = check()
        except AlignError as error:
            found = Finding("stopped", "", "fail", str(error))
        seconds = round(time.monotonic() - began, 3)
        lines.append(Line(name, found.value, found.bound, found.verdict, found.remedy, seconds))
    return lines


def at_most(value: float, limit: float, *, unit: str, remedy: str, fails: bool = True) -> Finding:
    """Hold a number to an upper bound; a number that is not finite is over every bound."""
    held = math.isfinite(value) and value <= limit
    verdict = "ok" if held else "fail" if fails else "warn"
    return Finding(f"{value:.3g} {unit}".strip(), f"at most {limit:g}", verdict, remedy)


class Seen(Generic[Item]):
    """Render examples and keep some of them, evenly spread, for the checks.

    Args:
        render: example -> tokenised row.
    """

    def __init__(self, render: Callable[[Example], Item]) -> None:
        self.examples: list[Example] = []
        self._render, self._count, self._stride = render, 0, 1

    def __call__(self, example: Example) -> Item:
        """Render one example."""
        if self._count % self._stride == 0:
            self.examples.append(example)
        if len(self.examples) == MAX_SEEN:
            self.examples, self._stride = self.examples[::2], 2 * self._stride
        self._count += 1
        return self._render(example)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Choose ``count`` items evenly over the sequence."""
    step = max(1, len(items) // count)
    return list(items[::step][:count])
