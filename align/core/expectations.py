"""Check a measured number against the range that a recipe expects."""

from collections.abc import Sequence
from typing import Any


def expectation(
    key: str, band: Sequence[float | None], value: object, *, problem: str = ""
) -> dict[str, Any]:
    """Return whether a number is within its range, as summary.json records it.

    Args:
        key: its name in tables.
        band: the lowest and highest expected value; None for no bound.
        value: what was measured.
        problem: why there is no value.

    Returns:
        ``key``, ``band``, ``value`` and ``holds``. Without a number, ``value`` is None, ``holds``
        is False and ``problem`` states the reason.
    """
    found: dict[str, Any] = {"key": key, "band": list(band), "value": None, "holds": False}
    if isinstance(value, bool) or not isinstance(value, int | float):
        return found | {"problem": problem or f"found {value!r} instead of a number"}
    low, high = band
    above = low is None or value >= low
    return found | {"value": value, "holds": above and (high is None or value <= high)}


def band_text(band: Sequence[float | None]) -> str:
    """Return a range in words, such as ``at least 0.1``."""
    low, high = band
    if low is None:
        return "any number" if high is None else f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
