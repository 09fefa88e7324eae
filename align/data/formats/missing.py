"""Recognize texts that say nothing: without a visible character, or words for a missing value."""

import unicodedata

_NEVER_TEXT = frozenset(("nan", "-nan", "nat", "<na>", "#n/a", "#na", "(null)", r"\n"))
_NEVER_TEXT |= {"[object object]", "#value!", "#ref!", "#name?", "#div/0!", "#null!", "#num!"}
"""How tables and programs write a value that is not there, in lower case (MySQL writes \\N)."""
_PERHAPS_TEXT = frozenset(("none", "na", "n/a", "n.a.", "null", "nil", "undefined"))
"""Also such words, but ones that a response may consist of."""
_UNSEEN = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))
"""Unicode categories of control characters, format characters and white space."""


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: it is empty, white space, or zero-width characters."""
    # The first character decides for almost every text.
    return all(unicodedata.category(character) in _UNSEEN for character in text)


def is_missing(text: str) -> bool:
    """Return whether a text is a missing value and never meant, such as ``nan``."""
    return _word(text) in _NEVER_TEXT


def may_be_missing(text: str) -> bool:
    """Return whether a text is a missing value or a response of one word, such as ``None``."""
    return _word(text) in _PERHAPS_TEXT


def _word(text: str) -> str:
    return text.strip().lower() if len(text) < 32 else ""
