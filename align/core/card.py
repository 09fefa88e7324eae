"""The preflight card: what was measured before a stage began, the bound, the verdict, the remedy.

Standard library only: stages write cards, the terminal and the report read them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CARD_FILE = "preflight.json"
TOKENS_FILE = "tokens.json"
"""A few rows of a stage, token by token, as they enter its loss."""
VERDICTS = ("ok", "warn", "fail", "not yet")
"""``not yet``: an input of the check is not made yet, so nothing was found out."""


@dataclass(frozen=True, slots=True)
class Line:
    """Hold one check: its name, the measured value, the bound it is held to, and what to do.

    ``remedy`` is empty where there is nothing to do; ``seconds`` is what the check took.
    """

    name: str
    value: str
    bound: str
    verdict: str
    remedy: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Card:
    """Hold the lines of one stage."""

    stage: str
    kind: str
    lines: Sequence[Line] = field(default_factory=tuple)

    @property
    def failed(self) -> list[Line]:
        """Give the lines that stop the stage."""
        return [line for line in self.lines if line.verdict == "fail"]

    @property
    def seconds(self) -> float:
        """Give what all checks took together."""
        return sum(line.seconds for line in self.lines)

    def plain(self) -> dict[str, Any]:
        """Give the card as plain data for JSON."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


def read_card(plain: Mapping[str, Any]) -> Card:
    """Give the card behind ``Card.plain``; KeyError or TypeError where it is none."""
    return Card(plain["stage"], plain["kind"], [Line(**line) for line in plain["lines"]])


def title(card: Card) -> str:
    """Sum a card up: ``sft (sft): 8 ok, 1 warn, 0.3 s``."""
    counts = Counter(line.verdict for line in card.lines)
    parts = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]]
    return f"{card.stage} ({card.kind}): {', '.join(parts)}, {card.seconds:.1f} s"


def table(card: Card) -> list[str]:
    """Give the card as text: the title, one line a check, the remedy below what is not ok."""
    rows = [title(card)]
    names = max((len(line.name) for line in card.lines), default=0)
    for line in card.lines:
        bound = f"  ({line.bound})" if line.bound else ""
        rows.append(f"  {line.verdict:<7}  {line.name:<{names}}  {line.value}{bound}")
        if line.remedy and line.verdict != "ok":
            rows.append(f"           {'':<{names}}  -> {line.remedy}")
    return rows
