"""Base of every specification, and which of its values identify the work that it describes."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


@dataclass(frozen=True, slots=True)
class Aside:
    """Mark a field that has no effect on the result, such as how often a checkpoint is saved."""


@dataclass(frozen=True, slots=True)
class Added:
    """Mark a field that a version added, whose default does what the versions before it did."""

    version: str


@dataclass(frozen=True, slots=True)
class Formerly:
    """Mark a field whose default has changed but gives the results of the former default."""

    value: object


class Spec(BaseModel):
    """Base of every specification; unknown keys and later changes are rejected."""

    # Deferred: only whole recipes are validated, and building each class takes time.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    def settings(self) -> dict[str, Any]:
        """Return the values that determine a result, as JSON data: the identity of the work.

        Left out are fields marked ``Aside``, and those marked ``Added`` at their default, so that a
        newer version of the suite recognizes what an older one finished; for the same reason a
        default marked ``Formerly`` counts as its former value.
        """
        return _settings(self, self.model_dump(mode="json"))


def _settings(part: object, plain: Any) -> Any:
    """Return the plain data of a value without what the identity leaves out."""
    if isinstance(part, list | tuple):
        return [_settings(item, data) for item, data in zip(part, plain, strict=True)]
    if isinstance(part, dict):
        return {key: _settings(part[key], plain[str(key)]) for key in part}
    if not isinstance(part, Spec):
        return plain
    fields = type(part).model_fields
    return {
        name: _settings(getattr(part, name), _recognized(fields[name], data))
        for name, data in plain.items()
        if not _left_out(fields[name], getattr(part, name))
    }


def _recognized(field: FieldInfo, data: object) -> object:
    """Return a field's value as it was written before its default changed."""
    former = next((mark for mark in field.metadata if isinstance(mark, Formerly)), None)
    return data if former is None or data != field.default else former.value


def _left_out(field: FieldInfo, value: object) -> bool:
    marks = field.metadata
    if any(isinstance(mark, Aside) for mark in marks):
        return True
    is_new = any(isinstance(mark, Added) for mark in marks)
    return is_new and value == field.get_default(call_default_factory=True)
