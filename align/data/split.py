"""Assign each row to the train or held-out side by a stable hash of its prompt."""

import hashlib
from typing import Literal

from align.core.types import Example, Text

Side = Literal["train", "heldout"]


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) from the text's sha256 (its first 8 bytes); it never changes."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def _first_question(text: Text) -> str:
    """Return the first user message of a conversation (else its first turn), or the plain text."""
    if isinstance(text, str):
        return text
    for turn in text:
        if turn["role"] == "user":
            return turn["content"]
    return text[0]["content"] if text else ""


def split_key(example: Example) -> str:
    """Return the text that determines the side: the first user message, else the whole text.

    The prompt takes precedence over the completion. Rows with the same first user message are
    therefore always on the same side, whatever follows.
    """
    for part in (example.prompt, example.completion):
        if part:
            question = _first_question(part)
            if question:
                return question
    return ""


def side_of(key: str, *, heldout_frac: float) -> Side:
    """Return the side of a key: held out if its hash fraction is below ``heldout_frac``."""
    return "heldout" if hash_fraction(key) < heldout_frac else "train"
