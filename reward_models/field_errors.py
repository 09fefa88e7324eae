"""Messages that name the wrong field of given JSON and the reason, from pydantic's errors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Place = tuple[str | int, ...]


def field_error(errors: Iterable[Mapping[str, Any]], given: object) -> tuple[Place, str]:
    """Return the place of the first wrong field, and what is wrong with it.

    A value that fits none of several types has an error for each of them. Those of the type that
    got furthest are meant, such as ``content.0.type`` of a message rather than ``content``.

    Args:
        errors: ``ValidationError.errors()``, with ``loc`` beginning at ``given``.
        given: what was validated.
    """
    found = [(_place(error, given), _message(error)) for error in errors]
    first = found[0][0]
    same = [(place, told) for place, told in found if place[: len(first)] == first]
    place = max((place for place, _ in same), key=len)
    told = dict.fromkeys(message for other, message in same if other == place)
    return place, ", or: ".join(told)


def _place(error: Mapping[str, Any], given: object) -> Place:
    """Return the keys of an error that are in the data: others name one of several types."""
    loc: Sequence[str | int] = error["loc"]
    kept: list[str | int] = []
    for i, part in enumerate(loc):
        missing = error["type"] == "missing" and i == len(loc) - 1
        try:
            given = given[part]  # type: ignore[index]  # a wrong kind of key raises
        except (LookupError, TypeError):
            if not missing:
                continue
        kept.append(part)
    if error["type"].startswith("union_tag"):
        kept.append(error["ctx"]["discriminator"].strip("'"))
    return tuple(kept)


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "union_tag_invalid":
        return (
            f"Input should be one of {error['ctx']['expected_tags']}, not {error['ctx']['tag']!r}"
        )
    if error["type"] == "union_tag_not_found":
        return "Field required"
    return error["msg"].removeprefix("Value error, ")
