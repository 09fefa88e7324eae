"""The section of the report that shows rows token by token: trained, masked, where they stop."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.core.card import TOKENS_FILE
from align.report.markup import Markup, tag
from align.report.read import RunRecord

ELEMENTS = {"masked": "i", "trained": "b", "stop": "u", "left out": "s"}
"""One short element a token: the colours stand in page.css, the sign of a stop in the text."""


def microscope(run: RunRecord) -> Markup | None:
    """Show the rows that every training stage kept of those that entered its loss."""
    found = {s.name: rows for s in run.stages if (rows := _read(run.directory / s.name))}
    if not found:
        return None
    legend = tag(
        "p",
        "A few rows of each training stage, one shade a token: ",
        tag("i", "masked"),
        " tokens are read, ",
        tag("b", "trained"),
        " ones enter the loss, and an answer ends in a ",
        tag("u", "stop\u2020"),
        ".",
        class_="tokens",
    )
    blocks = [
        tag("details", tag("summary", name), *map(_view, rows), open=None if i else "open")
        for i, (name, rows) in enumerate(found.items())
    ]
    return tag("section", tag("h2", "What is trained, token by token"), legend, *blocks)


def _read(folder: Path) -> list[Mapping[str, Any]]:
    try:
        return json.loads((folder / TOKENS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # a stage that trains nothing, or one that another version wrote


def _view(view: Mapping[str, Any]) -> Markup:
    counts: Mapping[str, int] = view["counts"]
    told = ", ".join(f"{counts[state]} {state}" for state in ("masked", "trained", "stop"))
    caption = tag(
        "figcaption",
        tag("b", f"{view['source']} {view['side']}"),
        tag("span", f"{sum(counts.values())} tokens: {told}"),
    )
    shown = [tag(ELEMENTS[state], _text(text, state)) for text, state in view["tokens"]]
    return tag("figure", caption, tag("pre", *shown), class_="tokens")


def _text(text: Any, state: str) -> str:
    if state == "left out":
        return f" {text} tokens "
    return str(text).replace("\n", "\u21b5\n") + "\u2020" * (state == "stop")
