"""The section of the report on what was checked before each stage took its first step."""

import json
from pathlib import Path

from align.core.card import CARD_FILE, Card, read_card, title
from align.report.markup import Markup, table, tag
from align.report.read import RunRecord

CLASSES = {"ok": "ok", "fail": "bad"}


def preflight(run: RunRecord) -> Markup | None:
    """Show the card of every stage that kept one; cards with something to say stand open."""
    cards = [card for s in run.stages if (card := _read(run.directory / s.name / CARD_FILE))]
    if not cards:
        return None
    said = "What was measured on real rows and the real model before the first step of each stage."
    return tag("section", tag("h2", "Preflight"), tag("p", said), *(_card(c) for c in cards))


def _read(path: Path) -> Card | None:
    try:
        return read_card(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a stage without a card, or one that another version wrote


def _card(card: Card) -> Markup:
    rows: list[list[object]] = [
        [
            line.name,
            tag("span", line.verdict, class_=CLASSES.get(line.verdict)),
            line.value,
            line.bound,
            line.remedy if line.verdict != "ok" else "",
            f"{line.seconds:.2f} s",
        ]
        for line in card.lines
    ]
    calm = all(line.verdict == "ok" for line in card.lines)
    heads: list[object] = ["check", "verdict", "measured", "bound", "what to do", "took"]
    return tag(
        "details", tag("summary", title(card)), table(heads, rows), open=None if calm else "open"
    )
