"""The preflight section: the checks that ran before each stage's first step."""

import json
from pathlib import Path

from align.core.card import CARD_FILE, Card, read_card, title
from align.report.markup import Markup, table, tag
from align.report.read import RunRecord

CLASSES = {"ok": "ok", "fail": "bad"}


def preflight(run: RunRecord) -> Markup | None:
    """Return the section with each stage's preflight card; cards with findings are expanded."""
    cards = [card for s in run.stages if (card := _read(run.directory / s.name / CARD_FILE))]
    if not cards:
        return None
    intro = "Measured on the stage's own rows and model before its first step."
    return tag("section", tag("h2", "Preflight"), tag("p", intro), *(_card(c) for c in cards))


def _read(path: Path) -> Card | None:
    try:
        return read_card(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # The stage has no card, or another version of align wrote it.


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
    passed = all(line.verdict == "ok" for line in card.lines)
    heads: list[object] = ["check", "verdict", "measured", "bound", "what to do", "time"]
    return tag(
        "details", tag("summary", title(card)), table(heads, rows), open=None if passed else "open"
    )
