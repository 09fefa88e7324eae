"""Read sets of good and bad responses to one prompt, in the format of RewardBench 2."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text, Turn
from align.data.formats.left_over import check_left_over
from align.data.formats.row_keys import apply_extras, take_extras
from align.data.formats.turns import shown, to_text
from align.data.load import MAX_REPORTED, source_of
from align.data.own_map import map_rows
from align.data.reading.sources import read_rows
from align.data.split import side_of, split_key
from align.recipe.schema import DataSpec

_FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """One prompt with its responses.

    Attributes:
        group: the row's ``subset``, else the name of the file.
        source: ``file:line``.
    """

    prompt: Text
    chosen: tuple[Text, ...]
    rejected: tuple[Text, ...]
    group: str
    source: str


def load_sets(specs: Sequence[DataSpec]) -> list[AnswerSet]:
    """Load rows ``{prompt, chosen: [response ...], rejected: [response ...]}`` in file order.

    A prompt or response that is a string becomes one turn of the user or the assistant, as in
    RewardBench 2. Both may also be lists of turns. Rows of attempts ``{"solution", "is_correct"}``
    (model_solutions) are read too; they are skipped unless they have both a correct and an
    incorrect attempt. ``split``, ``map`` and ``rename`` work as for other data.

    Raises:
        DataError: a row is invalid (up to 20 are listed), or no rows are left.
    """
    found: list[AnswerSet] = []
    errors: list[str] = []
    for spec in specs:
        _check_spec(spec)
        assert spec.path is not None
        kept: list[AnswerSet] = []
        name, side = source_of(spec)
        for row, source in map_rows(read_rows(name), spec.map):
            try:
                if isinstance(row, DataError):
                    raise row
                row = _attempts(row) if isinstance(row, dict) else row
                if row is None:
                    continue
                answers = _set_of(row, spec, source)
            except DataError as error:
                errors.append(str(error))
                continue
            # The same split as for pairs: a prompt is held out in all files or in none.
            key = split_key(Example(answers.prompt))
            if side in ("all", side_of(key, heldout_frac=spec.heldout_frac)):
                kept.append(answers)
        found += kept[: spec.rows]
    if errors:
        more = "\n... and more" if len(errors) > MAX_REPORTED else ""
        raise DataError("\n".join(errors[:MAX_REPORTED]) + more)
    if not found:
        raise DataError("sets: no rows are left. Check the files, or use split: all.")
    return found


def _check_spec(spec: DataSpec) -> None:
    if spec.path is None or spec.format != "auto" or spec.weight != 1.0:
        raise DataError(
            f"{spec.path or spec.labels or spec.world}: sets of answers are read from a 'path' of "
            "rows with prompt, chosen and rejected; 'labels', 'world', 'format' and 'weight' have "
            "no effect"
        )


def _attempts(row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a set made from a question's attempts; None if all are correct or all incorrect."""
    tried = [v for v in row.values() if isinstance(v, dict) and "is_correct" in v]
    if "question" not in row or not tried:
        return row
    right = list(dict.fromkeys(v["solution"] for v in tried if v["is_correct"] is True))
    wrong = list(dict.fromkeys(v["solution"] for v in tried if v["is_correct"] is False))
    return (
        {"prompt": row["question"], "chosen": right, "rejected": wrong} if right and wrong else None
    )


def _set_of(row: dict[str, Any] | str, spec: DataSpec, source: str) -> AnswerSet:
    if not isinstance(row, dict):
        raise DataError(f"{source}: plain text; expected fields prompt, chosen and rejected")
    row = {spec.rename.get(key, key): value for key, value in row.items()}
    missing = [name for name in _FIELDS if name not in row]
    if missing:
        raise DataError(f"{source}: no field {missing}; the row has {sorted(row)}")
    row, extras = take_extras(row, kind="preference", used=_FIELDS, source=source)
    if extras.tools or extras.template_kwargs:
        raise DataError(
            f"{source}: tools and chat_template_kwargs are not supported in a set of responses. "
            "Remove them, or write them into the prompt.",
            code="D045",
        )
    chosen, rejected = (_answers(row[name], name, source) for name in ("chosen", "rejected"))
    prompt = to_text(row["prompt"], field="prompt", source=source)
    if isinstance(prompt, str):
        prompt = [Turn(role="user", content=prompt)]
    prompt = apply_extras(Example(prompt, source=source), extras).prompt
    columns = {key: value for key, value in row.items() if key not in _FIELDS}
    check_left_over(Example(prompt, columns=columns, source=source), kind="prompts")
    # A subset has a name in the rows, or else that of its file.
    stem = Path(source.rpartition(":")[0]).stem
    return AnswerSet(prompt, chosen, rejected, str(row.get("subset") or stem), source)


def _answers(value: object, field: str, source: str) -> tuple[Text, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{source}: {field}: expected a list of answers, found {shown(value)}")
    if isinstance(value[0], dict):
        raise DataError(
            f"{source}: {field}: a list of turns is one answer; expected a list of answers, each a "
            "text or a list of turns"
        )
    texts = [to_text(a, field=f"{field}[{i}]", source=source) for i, a in enumerate(value)]
    return tuple([Turn(role="assistant", content=t)] if isinstance(t, str) else t for t in texts)
