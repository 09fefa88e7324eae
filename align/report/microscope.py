"""The token view: example rows token by token, with trained, masked and stop tokens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.core.card import TOKENS_FILE
from align.report.markup import Markup, tag
from align.report.read import RunRecord

ELEMENTS = {"masked": "i", "trained": "b", "stop": "u", "left out": "s"}
"""A short element name per token state; page.css defines the color of each element."""


def microscope(run: RunRecord) -> Markup | None:
    """Return the section with the example rows that each training stage recorded."""
    found = {s.name: rows for s in run.stages if (rows := _read(run.directory / s.name))}
    if not found:
        return None
    legend = tag(
        "p",
        "A few rows of each training stage, token by token: ",
        tag("i", "masked"),
        " tokens are context only, ",
        tag("b", "trained"),
        " tokens contribute to the loss, and a response ends in a ",
        tag("u", "stop\u2020"),
        " token.",
        class_="tokens",
    )
    blocks = [
        tag("details", tag("summary", name), *map(_view, rows), open=None if i else "open")
        for i, (name, rows) in enumerate(found.items())
    ]
    return tag("section", tag("h2", "Token view"), legend, *blocks)


def _read(folder: Path) -> list[Mapping[str, Any]]:
    try:
        return json.loads((folder / TOKENS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []  # The stage does not train, or another version of align wrote it.


def _view(view: Mapping[str, Any]) -> Markup:
    counts: Mapping[str, int] = view["counts"]
    states = ", ".join(f"{counts[state]} {state}" for state in ("masked", "trained", "stop"))
    caption = tag(
        "figcaption",
        tag("b", f"{view['source']} {view['side']}"),
        tag("span", f"{sum(counts.values())} tokens: {states}"),
    )
    shown = [tag(ELEMENTS[state], _text(text, state)) for text, state in view["tokens"]]
    return tag("figure", caption, tag("pre", *shown), class_="tokens")


def _text(text: object, state: str) -> str:
    # Long rows are abbreviated: the text of a left-out run is its number of tokens.
    if state == "left out":
        return f" {text} tokens "
    # Color alone would not show a line break or a stop token in print.
    return str(text).replace("\n", "\u21b5\n") + "\u2020" * (state == "stop")
