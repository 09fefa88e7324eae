"""The preflight card: for each check the measured value, the bound, the verdict and the remedy.

Standard library only: stages write cards, and the terminal and the report read them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CARD_FILE = "preflight.json"
TOKENS_FILE = "tokens.json"
"""File with a few rows of a stage, token by token, as they enter its loss."""
VERDICTS = ("ok", "warn", "fail", "not yet")
"""``not yet``: an input of the check does not exist yet, so there is no result."""


@dataclass(frozen=True, slots=True)
class Line:
    """One check: its name, the measured value, the bound, the verdict, and what to do.

    ``remedy`` is empty if there is nothing to do; ``seconds`` is the duration of the check.
    """

    name: str
    value: str
    bound: str
    verdict: str
    remedy: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Card:
    """The checks of one stage."""

    stage: str
    kind: str
    lines: Sequence[Line] = field(default_factory=tuple)

    @property
    def failed(self) -> list[Line]:
        """Return the checks that stop the stage."""
        return [line for line in self.lines if line.verdict == "fail"]

    @property
    def seconds(self) -> float:
        """Return the total duration of all checks."""
        return sum(line.seconds for line in self.lines)

    def plain(self) -> dict[str, Any]:
        """Return the card as plain data for JSON."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


def read_card(plain: Mapping[str, Any]) -> Card:
    """Return the card from ``Card.plain``; raise KeyError or TypeError if it is invalid."""
    return Card(plain["stage"], plain["kind"], [Line(**line) for line in plain["lines"]])


def title(card: Card) -> str:
    """Return a one-line summary of a card: ``sft (sft): 8 ok, 1 warn, 0.3 s``."""
    counts = Counter(line.verdict for line in card.lines)
    parts = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]]
    return f"{card.stage} ({card.kind}): {', '.join(parts)}, {card.seconds:.1f} s"


def table(card: Card) -> list[str]:
    """Return the card as text: the title, one line per check, and remedies below failed checks."""
    rows = [title(card)]
    names = max((len(line.name) for line in card.lines), default=0)
    for line in card.lines:
        bound = f"  ({line.bound})" if line.bound else ""
        rows.append(f"  {line.verdict:<7}  {line.name:<{names}}  {line.value}{bound}")
        if line.remedy and line.verdict != "ok":
            first, *more = line.remedy.splitlines()
            rows.append(f"           {'':<{names}}  -> {first}")
            rows += [f"           {'':<{names}}     {text}" for text in more]
    return rows
