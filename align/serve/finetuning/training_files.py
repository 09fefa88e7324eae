"""Training files: what is wrong in which line, and what to do about it."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from align.core.errors import DataError
from align.core.types import Example
from align.data.load import read_examples
from align.data.split import split_key
from align.recipe.schema import DataSpec

MIN_ROWS = 10
"""Fewest rows of a training file, as OpenAI requires."""
MAX_LINE = 4 * 2**20
ROLES = ("system", "developer", "user", "assistant", "tool")


READ_AS: dict[str, tuple[Literal["sft", "preference", "prompts"], dict[str, str]]] = {
    "supervised": ("sft", {"prompt": "messages", "completion": "messages"}),
    "dpo": (
        "preference",
        {
            "prompt": "input.messages",
            "completion": "preferred_output",
            "rejected": "non_preferred_output",
        },
    ),
    "reinforcement": ("prompts", {"prompt": "messages"}),
}
"""What the rows of each method are to the stages, and the API's names of their parts."""


class InvalidFileError(ValueError):
    """A file that cannot be trained on; the message names the line and the remedy.

    Args:
        message: what is wrong.
        param: the request's field that names the file.
    """

    def __init__(self, message: str, *, param: str = "training_file") -> None:
        super().__init__(message)
        self.param = param


def check_file(path: Path, method: str, *, minimum: int) -> int:
    """Return the number of rows of a JSONL file.

    Args:
        path: the file.
        method: supervised, dpo or reinforcement.
        minimum: fewest rows.

    Raises:
        InvalidFileError: names the first wrong line.
    """
    check, count = CHECKS[method], 0
    with path.open("rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise InvalidFileError(f"line {number}: longer than {MAX_LINE} bytes")
            if not line.strip():
                continue
            problem = _row_problem(line, check)
            if problem:
                raise InvalidFileError(f"line {number}: {problem}")
            count += 1
    if count < minimum:
        raise InvalidFileError(f"found {count} examples, expected at least {minimum}. Add more.")
    return count


def check_rows(path: Path, method: str) -> None:
    """Check the rows of a file with the rules of the stage that trains on them.

    Raises:
        InvalidFileError: names the first wrong line.
    """
    for _ in _examples(path, method):
        pass  # reading checks each row


def check_apart(training: Path, validation: Path, method: str) -> None:
    """Check that no question is in both files: the stages refuse to validate on it.

    Raises:
        InvalidFileError: names the first line, of the validation file.
    """
    asked = {split_key(example): line for line, example in _examples(validation, method)}
    for line, example in _examples(training, method):
        if (late := asked.get(split_key(example))) is not None:
            raise InvalidFileError(
                f"validation_file: line {late}: its first user message is also in line {line} of "
                "training_file. Remove the row from one of the files.",
                param="validation_file",
            )


def _examples(path: Path, method: str) -> Iterator[tuple[int, Example]]:
    """Yield line and example of each row."""
    kind, names = READ_AS[method]
    try:
        for example in read_examples(DataSpec(path=str(path)), kind=kind, seed=0):
            yield int(example.source.rpartition(":")[2]), example
    except DataError as error:
        first = str(error).splitlines()[0]
        found = re.fullmatch(rf"{re.escape(str(path))}:(\d+): (.*)", first)
        if found is None:  # about the whole file
            raise InvalidFileError(first.removeprefix(f"{path}: ")) from None
        told = re.sub(r"^\w+", lambda part: names.get(part[0], part[0]), found[2])
        raise InvalidFileError(f"line {found[1]}: {told}. Correct or remove the row.") from None


def as_asked(told: str, folder: Path) -> tuple[str, str | None]:
    """Return what a run says with the names of the API for the files of a job.

    Args:
        told: by the run.
        folder: of the job, which has its files.

    Returns:
        The text, and the parameter of the file that it names; None if it names none.
    """
    place = re.compile(
        rf"{re.escape(str(folder.resolve()))}/(training|validation)\.jsonl(?::(\d+))?"
    )
    first = place.search(told)

    def named(found: re.Match[str]) -> str:
        return f"{found[1]}_file" + (f": line {found[2]}" if found[2] else "")

    return place.sub(named, told), f"{first[1]}_file" if first else None


def _row_problem(line: bytes, check: Callable[[dict[str, Any]], str | None]) -> str | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "not UTF-8. Save the file in UTF-8."
    except (ValueError, RecursionError) as error:
        return f"no JSON ({error}). Write one JSON object per line."
    return check(row) if isinstance(row, dict) else "expected a JSON object per line."


def _messages(found: object, where: str, *, roles: tuple[str, ...] = ROLES) -> str | None:
    """Return what is wrong with a list of messages."""
    if not isinstance(found, list) or not found:
        return f"'{where}' must be a list of at least one message."
    for i, message in enumerate(found):
        place = f"{where}[{i}]"
        if not isinstance(message, dict):
            return f"{place} must be an object with role and content."
        role = message.get("role")
        if role not in roles:
            return f"{place}.role is {role!r}; expected one of {', '.join(roles)}."
        if (weight := message.get("weight", 1)) not in (0, 1):
            return f"{place}.weight is {weight!r}; expected 0 or 1."
        if "weight" in message and role != "assistant":
            return f"{place}.weight: only assistant messages have one. Remove it."
        content = message.get("content")
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            return f"{place}.content is missing."
        if content is not None and not isinstance(content, str | list):
            return f"{place}.content must be text, found {type(content).__name__}."
        if isinstance(content, list) and not all(_is_text(part) for part in content):
            return f"{place}.content: only parts of the type text can be trained on."
    return None


def _is_text(part: object) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _supervised(row: dict[str, Any]) -> str | None:
    if "messages" not in row:
        return '\'messages\' is missing; expected {"messages": [{"role": ..., "content": ...}]}.'
    problem = _messages(row["messages"], "messages")
    if problem:
        return problem
    trained = [m for m in row["messages"] if m["role"] == "assistant" and m.get("weight", 1) == 1]
    return None if trained else "no assistant message to train on. Add one, or a weight of 1."


def _dpo(row: dict[str, Any]) -> str | None:
    for key in ("input", "preferred_output", "non_preferred_output"):
        if key not in row:
            return f"'{key}' is missing; a row has input, preferred_output, non_preferred_output."
    if not isinstance(row["input"], dict):
        return "'input' must be an object with messages."
    replies = ("assistant", "tool")
    return (
        _messages(row["input"].get("messages"), "input.messages")
        or _messages(row["preferred_output"], "preferred_output", roles=replies)
        or _messages(row["non_preferred_output"], "non_preferred_output", roles=replies)
        or (
            "preferred_output and non_preferred_output are equal. Remove the row."
            if row["preferred_output"] == row["non_preferred_output"]
            else None
        )
    )


def _reinforcement(row: dict[str, Any]) -> str | None:
    problem = _messages(row.get("messages"), "messages")
    if problem:
        return problem
    if row["messages"][-1]["role"] != "user":
        return "the last message must be of the user: the model answers it."
    return "'prompt' is a name of the server's own. Rename the key." if "prompt" in row else None


CHECKS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "supervised": _supervised,
    "dpo": _dpo,
    "reinforcement": _reinforcement,
}


def write_prompts(source: Path, target: Path) -> None:
    """Write the rows of a checked reinforcement file as prompts with columns."""
    with source.open(encoding="utf-8-sig") as read, target.open("w", encoding="utf-8") as write:
        for line in read:
            if not line.strip():  # kept, so that messages name the lines of the source
                write.write("\n")
                continue
            row = json.loads(line)
            columns = {k: v for k, v in row.items() if k != "messages"}
            item = json.dumps(columns, ensure_ascii=False)
            # One column of text: rows may have different keys, or one key with different types.
            told = {"prompt": row["messages"], "item": item}
            write.write(json.dumps(told, ensure_ascii=False) + "\n")
