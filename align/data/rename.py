"""Rename the fields of a row as a recipe asks."""

from collections import Counter
from collections.abc import Mapping

from align.core.errors import DataError
from align.data.json_reader import Row


def rename_fields(row: Row, rename: Mapping[str, str], *, source: str) -> Row:
    """Give the row with its fields renamed ``{old: new}``.

    Raises:
        DataError: a field is missing, or two would have one name.
    """
    if not rename:
        return row
    if isinstance(row, str):
        raise DataError(f"{source}: 'rename' has no effect on plain text; remove it", code="D044")
    missing = sorted(set(rename) - set(row))
    if missing:
        message = f"{source}: rename: no field {missing}; the row has {sorted(row)}"
        raise DataError(message, code="D040")
    names = Counter(rename.get(key, key) for key in row)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        message = f"{source}: rename: {twice} would stand twice in {sorted(row)}"
        raise DataError(message, code="D042")
    return {rename.get(key, key): value for key, value in row.items()}
