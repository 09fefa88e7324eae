"""Values as plain data: JSON, with containers other than dict tagged by their type.

Programs and their tests exchange only these; other values stay with the program.
"""

import collections
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

_DATES = ("datetime.datetime", "datetime.date", "datetime.time")
_KINDS = (*_DATES, "datetime.timedelta", "decimal.Decimal", "fractions.Fraction")
"""Further types of the standard library whose values are sent as text."""
_ARRAY = re.compile(r"[<>|=]?[biufcU]\d*")
"""Types of numpy's arrays that are sent: of numbers, truth values or texts."""
Plain = Any
"""What a message consists of: JSON, with containers other than dict tagged by their type."""
_TAGS: dict[str, Callable[[Any], Any]] = {
    **{"l": list, "t": tuple, "s": set, "f": frozenset},
    **{"d": dict, "b": lambda text: text.encode("latin-1"), "c": lambda parts: complex(*parts)},
    "k": lambda parts: _made(*parts),
}


def encode(value: Any, refer: Callable[[Any], int | str]) -> Plain:
    """Return a value as plain data; ``refer`` returns references to objects that are not."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, bytes | bytearray):
        return {"b": bytes(value).decode("latin-1")}
    if isinstance(value, complex):
        return {"c": [value.real, value.imag]}
    if isinstance(value, Mapping):
        return {"d": [[encode(k, refer), encode(v, refer)] for k, v in value.items()]}
    if isinstance(value, tuple) and (fields := getattr(value, "_fields", None)):
        return {"n": [type(value).__name__, list(fields), [encode(x, refer) for x in value]]}
    for tag, kind in (("l", list), ("t", tuple), ("s", set), ("f", frozenset)):
        if isinstance(value, kind):
            return {tag: [encode(item, refer) for item in value]}
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name in _KINDS:
        return {"k": [name, value.isoformat() if name in _DATES else _written(value)]}
    # A scalar or an array of numpy.
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return encode(value.item(), refer)
    if name == "numpy.ndarray" and _ARRAY.fullmatch(value.dtype.str):
        return {"a": [value.dtype.str, value.shape, encode(value.ravel().tolist(), refer)]}
    return {"h": refer(value)}


def _written(value: Any) -> Plain:
    """Return the arguments with which a value of a type in ``_KINDS`` is made again."""
    return [value.days, value.seconds, value.microseconds] if hasattr(value, "days") else str(value)


def _made(name: str, written: Plain) -> Any:
    """Return the value of a type in ``_KINDS``."""
    if name not in _KINDS:
        raise ValueError(f"not a type of plain data: {name}")
    module, _, kind = name.partition(".")
    made = getattr(importlib.import_module(module), kind)
    if name in _DATES:
        return made.fromisoformat(written)
    return made(*written) if isinstance(written, list) else made(written)


def _array(dtype: str, shape: object, items: list[Any]) -> Any:
    if not _ARRAY.fullmatch(dtype):
        raise ValueError(f"not a type of plain data: {dtype}")
    return importlib.import_module("numpy").array(items, dtype).reshape(shape)


def decode(message: Plain, find: Callable[[Any], Any]) -> Any:
    """Return the value of plain data; ``find`` returns the object of a reference."""
    if not isinstance(message, dict):
        return message
    # A mapping is an encoded value with its tag; every other value is itself.
    ((tag, inner),) = message.items()
    if tag == "h":
        return find(inner)
    if tag == "d":
        return {decode(k, find): decode(v, find) for k, v in inner}
    if tag == "n":
        name, fields, items = inner
        return collections.namedtuple(name, fields)(*(decode(item, find) for item in items))
    if tag == "a":
        dtype, shape, items = inner
        return _array(dtype, shape, decode(items, find))
    if tag in ("l", "t", "s", "f"):
        inner = [decode(item, find) for item in inner]
    return _TAGS[tag](inner)
