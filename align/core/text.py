"""Text for people: suggestions for misspelled names and values shown in messages."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Give ``; did you mean 'x'?`` for the nearest candidate, or nothing."""
    close = get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def shown(value: Any) -> str:
    """Describe a value for a message, shortened."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
