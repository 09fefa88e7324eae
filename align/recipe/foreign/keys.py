"""Keys of another tool's configuration: each is converted, or reported with line and reason."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.core.errors import RecipeError
from align.core.text import shown
from align.recipe.source import Key, Mark, dotted, plain_scalar

_WORDS = {
    **dict.fromkeys(("yes", "y", "on", "true", "1"), True),
    **dict.fromkeys(("no", "n", "off", "false", "0"), False),
}


@dataclass(frozen=True, slots=True)
class Note:
    """What became of a key that has no exact equivalent.

    Attributes:
        place: ``file:line``.
        key: dotted key in the configuration.
        what: the reason, or how the recipe differs.
        lost: the recipe does not do what the key asks for.
    """

    place: str
    key: str
    what: str
    lost: bool = False

    @property
    def line(self) -> str:
        """Return the note as one line."""
        return f"{self.place}: {self.key}: {'NOT CONVERTED: ' if self.lost else ''}{self.what}"


class Keys:
    """A mapping of the configuration that records which of its keys were read.

    Args:
        data: the mapping.
        marks: the place of each value in the file.
        at: key path of the mapping.
        notes: list that notes are added to; shared by nested mappings.
    """

    def __init__(
        self, data: Mapping[str, Any], marks: Mapping[Key, Mark], *, at: Key, notes: list[Note]
    ) -> None:
        self.data, self.marks, self.at, self.notes = data, marks, at, notes
        self.taken: set[str] = set()

    def place(self, name: str) -> str:
        """Return ``file:line`` of a key, or of the mapping if the key is missing."""
        mark = self.marks.get((*self.at, name)) or self.marks.get(self.at) or self.marks[()]
        return mark.origin

    def wrong(self, name: str, what: str) -> RecipeError:
        """Return the error for a value that cannot be converted."""
        told = " ".join(what.split())  # a value may have several lines
        return RecipeError(f"{self.place(name)}: {dotted((*self.at, name))}: {told}")

    def note(self, name: str, what: str, *, lost: bool = False) -> None:
        """Report how a key differs in the recipe, or that it is not converted."""
        key = dotted((*self.at, name))
        self.notes.append(Note(self.place(name), key, " ".join(what.split()), lost))

    def has(self, name: str) -> bool:
        """Return whether a key has a value other than null."""
        return self.data.get(name) is not None

    def take(self, name: str, default: object = None) -> Any:
        """Return the value of a key, which then counts as converted; null is the default."""
        self.taken.add(name)
        value = self.data.get(name)
        return default if value is None else value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a truth value; YAML 1.1's yes and no are accepted."""
        value = self.choice(name, default)
        return bool(value)

    def choice(self, name: str, default: object = None) -> Any:
        """Return a value that is a truth value, in any of its words, or a word of its own."""
        value = self.take(name, default)
        word = value.strip().lower() if isinstance(value, str) else value
        return _WORDS.get(word, word) if isinstance(word, str) else word

    def number(self, name: str, default: object = None) -> Any:
        """Return a number; one in quotes is accepted.

        Raises:
            RecipeError: the value is something else.
        """
        value = self.take(name, default)
        parsed = plain_scalar(value.strip()) if isinstance(value, str) else value
        wrong = isinstance(parsed, bool) or not isinstance(parsed, int | float)
        if value is not None and wrong:
            raise self.wrong(name, f"found {shown(value)}; expected a number")
        return parsed

    def count(self, name: str, default: int) -> int:
        """Return a whole number of 1 or more.

        Raises:
            RecipeError: the value is something else.
        """
        value = self.number(name, default)
        if value < 1 or value != int(value):
            raise self.wrong(name, f"found {value}; expected a whole number of 1 or more")
        return int(value)

    def text(self, name: str, default: str = "") -> str:
        """Return a text.

        Raises:
            RecipeError: the value is a list or mapping.
        """
        value = self.take(name, default)
        if isinstance(value, list | dict):
            raise self.wrong(name, f"found {shown(value)}; expected a text")
        return str(value).strip()

    def texts(self, name: str) -> list[str]:
        """Return a list of texts, also if it is written as ``a,b`` or as a single value."""
        value = self.take(name, [])
        items = value if isinstance(value, list) else str(value).split(",")
        if any(isinstance(item, list | dict) for item in items):
            raise self.wrong(name, f"found {shown(value)}; expected names")
        return [str(item).strip() for item in items if item is not None and str(item).strip()]

    def mapping(self, name: str) -> "Keys":
        """Return a nested mapping; empty if the key is missing.

        Raises:
            RecipeError: the value is something else.
        """
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, f"found {shown(value)}; expected a mapping")
        return Keys(value, self.marks, at=(*self.at, name), notes=self.notes)

    def mappings(self, name: str) -> list["Keys"]:
        """Return a list of nested mappings.

        Raises:
            RecipeError: the value is something else.
        """
        value = self.take(name, [])
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, dict) for item in items):
            raise self.wrong(name, f"found {shown(value)}; expected a list of mappings")
        return [
            Keys(item, self.marks, at=(*self.at, name, i), notes=self.notes)
            for i, item in enumerate(items)
        ]

    def report_rest(self, reasons: Mapping[str, str], *, tool: str) -> None:
        """Report every key that was not read, with the reason that ``reasons`` has for it.

        Args:
            reasons: key, or the beginning of keys with ``*`` at its end, to the reason; a reason
                that begins with ``-`` concerns keys that have no effect on the result.
            tool: name of the other tool.
        """
        for name, value in self.data.items():
            if name in self.taken or value is None or value in ("", [], {}):
                continue
            reason = _reason(name, reasons)
            if reason is None:
                self.note(name, f"not among the keys of {tool} that align knows", lost=True)
            elif reason.startswith("-"):
                self.note(name, reason.removeprefix("-").strip())
            else:
                used = value is not False and value != 0
                self.note(name, reason if used else f"off, as in align ({reason})", lost=used)


def _reason(name: str, reasons: Mapping[str, str]) -> str | None:
    if name in reasons:
        return reasons[name]
    starts = [key for key in reasons if key.endswith("*") and name.startswith(key[:-1])]
    return reasons[max(starts, key=len)] if starts else None


def folder_name(path: str, default: str) -> str:
    """Return a name for the run from an output folder."""
    last = re.sub(r"[^A-Za-z0-9_.-]", "-", path.replace("\\", "/").rstrip("/").split("/")[-1])
    return last.strip("-.")[:100] or default
