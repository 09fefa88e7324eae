"""Read rows of a text, or a conversation, and the class it belongs to."""

from typing import Any

from align.core.errors import DataError
from align.core.types import Example
from align.data.turns import shown, to_text

FIELDS = ("text", "messages", "prompt")
"""What may hold the text of a row, the first that is there."""


def from_classes(row: dict[str, Any], source: str) -> list[Example]:
    """Read ``text``, ``messages`` or ``prompt``, and the class ``label``: text, number or boolean.

    The example's completion is the text (no template is applied) or the conversation; its column
    ``label`` is the name of the class.
    """
    field = next(name for name in FIELDS if name in row)
    text = to_text(row[field], field=field, source=source)
    if "label_prob" in row:
        raise DataError(f"{source}: label_prob has no effect on classes; remove the column")
    columns = {key: value for key, value in row.items() if key not in (field, "label")}
    columns["label"] = class_name(row["label"], source)
    return [Example(prompt="", completion=text, columns=columns, source=source)]


def class_name(label: Any, source: str) -> str:
    """Give the name of a class: a text as it stands, a whole number or a boolean in words.

    Raises:
        DataError: it is something else, or empty.
    """
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, int) or (isinstance(label, str) and label.strip()):
        return str(label)
    raise DataError(
        f"{source}: label: expected the name or the number of a class, found {shown(label)}"
    )
