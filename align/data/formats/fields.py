"""Fields inside the objects of a row, and those whose names say what is trained."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_LOSS_WORDS = frozenset(("loss", "losses", "mask", "masks", "masked", "weight", "weights"))
_LOSS_WORDS |= {"train", "trained", "trainable", "training"}
_WORD_BORDER = re.compile(r"[^A-Za-z]+|(?<=[a-z])(?=[A-Z])")


def is_about_loss(key: str, value: object) -> bool:
    """Return whether a key such as ``loss_mask`` or ``trainOnInputs`` says what is trained."""
    words = {word.lower() for word in _WORD_BORDER.split(key)}
    return bool(words & _LOSS_WORDS) and _is_numeric(value)


def fields_inside(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each field inside the objects of a row.

    The name is ``outer.inner``, or ``outer[2].inner`` in a list. A column that was renamed to
    ``..._column`` was set aside on purpose. Text is not searched, although it may be JSON.
    """
    for key, value in row.items():
        if key.endswith("_column"):
            continue
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", item) for name, item in value.items())
            yield from ((f"{key}.{name}", item) for name, item in fields_inside(value))
        elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
            items = {f"{key}[{i}]": item for i, item in enumerate(value)}
            yield from fields_inside(items)


def outer_of(field: str) -> str:
    """Return the column that a field of ``fields_inside`` is in."""
    return re.split(r"[.\[]", field, maxsplit=1)[0]


def _is_numeric(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_numeric(item) for item in value)
    return isinstance(value, bool | int | float)
