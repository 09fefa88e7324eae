"""Training files: what is wrong in which line, and what to do about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIN_ROWS = 10
"""Fewest rows of a training file, as OpenAI requires."""
MAX_LINE = 4 * 2**20
ROLES = ("system", "developer", "user", "assistant", "tool")


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
        for line in filter(str.strip, read):
            row = json.loads(line)
            columns = {k: v for k, v in row.items() if k != "messages"}
            item = json.dumps(columns, ensure_ascii=False)
            # One column of text: rows may have different keys, or one key with different types.
            told = {"prompt": row["messages"], "item": item}
            write.write(json.dumps(told, ensure_ascii=False) + "\n")
