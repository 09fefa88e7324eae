"""Decide train or held-out for a row by a stable hash of its prompt."""

import hashlib
from typing import Literal

from align.core.types import Example, Text

Side = Literal["train", "heldout"]


def hash_fraction(text: str) -> float:
    """Map a text to [0, 1) by the first 8 bytes of its sha256; the same everywhere and always."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def first_question(text: Text) -> str:
    """Give the first user message of a conversation (its first turn if none), or the plain text."""
    if isinstance(text, str):
        return text
    for turn in text:
        if turn["role"] == "user":
            return turn["content"]
    return text[0]["content"] if text else ""


def split_key(example: Example) -> str:
    """Give the text that decides the side: the first user message, else the prompt, else the text.

    Rows that share their first user message therefore never stand on both sides, whatever
    follows it.
    """
    for part in (example.prompt, example.completion):
        if part:
            question = first_question(part)
            if question:
                return question
    return ""


def side_of(key: str, *, heldout_frac: float) -> Side:
    """Say on which side a key stands: held out when its hash fraction is below the share."""
    return "heldout" if hash_fraction(key) < heldout_frac else "train"
