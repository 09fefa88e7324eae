"""Text of users and for users: names, suggestions, values in messages, hidden secrets."""

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TextIO


def suggest(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ``; did you mean 'x'?`` with the nearest candidate, or an empty string.

    ``cutoff``: how alike they must be, from 0 to 1.
    """
    return _suggest(name, tuple(map(str, candidates)), cutoff)


@lru_cache(maxsize=4096)
def _suggest(name: str, candidates: tuple[str, ...], cutoff: float) -> str:
    # Every row of a file asks the same: searching took three quarters of the time of a load.
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


def shown(value: object) -> str:
    """Return a short description of a value for a message."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    # repr shows quotes and escapes, so '1' and 1 differ in the message.
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, ORG/NAME; a relative path can have it too."""
    return _HUB_ID.fullmatch(name) is not None


_VARIABLE = re.compile(r"^~(?=/|$)|\$([A-Za-z_]\w*)|%([A-Za-z_]\w*)%")


def unexpanded(path: str) -> str:
    """Return how a recipe writes the variables in a path that nothing expands; "" without any."""
    written = _VARIABLE.sub(lambda m: "${" + (m[1] or m[2] or "HOME") + "}", path)
    return f"; write {written}: a recipe expands ${{NAME}} only" if written != path else ""


_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)


def visible(text: str) -> str:
    """Return text with control characters escaped.

    Text of models, data and recipes could otherwise move the cursor, set the window title or
    reverse the reading direction (C0 and C1 controls, bidi marks). Line breaks and tabs are kept.
    Secrets of the recipe are replaced by the names of their variables.
    """
    return _CONTROLS.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), hidden(text))


class VisibleStream:
    """A text stream that escapes control characters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``visible(text)``."""
        return self._stream.write(visible(text))

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


_SECRET_NAME = re.compile(r"(?:^|_)(?:API)?(?:KEY|TOKEN|SECRET|PASS|PASSWORD|PASSWD|AUTH)(?:_|$)")
_secrets: dict[str, str] = {}


def is_secret_name(name: str) -> bool:
    """Return True if the name of an environment variable indicates a secret, such as API_KEY."""
    return _SECRET_NAME.search(name.upper()) is not None


def keep_secret(name: str, value: str) -> None:
    """Hide the value of this environment variable in all output; ``${name}`` replaces it."""
    # Replacing very short values would garble unrelated text.
    if len(value) >= 4:
        _secrets[value] = name


def hidden(value: object) -> Any:
    """Return text, or lists and mappings of it, with each secret replaced by ``${NAME}``."""
    if isinstance(value, dict):
        return {key: hidden(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [hidden(inside) for inside in value]
    if isinstance(value, str):
        # Longest first: a secret may contain another one.
        for secret in sorted(_secrets, key=len, reverse=True):
            value = value.replace(secret, "${" + _secrets[secret] + "}")
    return value


def secret_names(value: object) -> list[str]:
    """Return the names of the secrets that ``hidden`` replaces in a value."""
    text = repr(value)
    return sorted({name for secret, name in _secrets.items() if repr(secret)[1:-1] in text})
