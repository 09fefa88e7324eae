"""Training files: what is wrong in which line, and what to do about it."""

import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from align.core.errors import DataError
from align.core.types import Example
from align.data.formats.detect import FormatDetector, to_examples
from align.data.reading.json import parse_lines
from align.data.split import split_key

MIN_ROWS = 10
"""Fewest rows of a training file, as OpenAI requires."""
MAX_LINE = 4 * 2**20
TICK_BYTES = 2**16
SOURCE = "file"
"""Name of a file in the messages of the readers, which is replaced by the API's."""
PLACE = re.compile(rf"^{SOURCE}(:\d+)*: ")
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
        param: the request's field that names the file, if it is known here.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def check_files(
    sources: Mapping[str, Path],
    folder: Path,
    method: str,
    *,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Check the files of a job, and put them into its folder as its run reads them.

    Each file is read once: first the validation file, then the training file. The error is the one
    of the first line that is wrong in any way; too few rows are noticed at the end of a file.

    Args:
        sources: the files, by ``validation`` and ``training``.
        folder: of the job.
        method: supervised, dpo or reinforcement.
        tick: called about every ``TICK_BYTES``; it may raise to end the work.

    Returns:
        The number of rows of each file.

    Raises:
        InvalidFileError: names the file, the line and the remedy.
    """
    counts: dict[str, int] = {}
    asked: dict[bytes, int] = {}
    for part in sorted(sources, reverse=True):
        target = folder / f"{part}.jsonl"
        try:
            counts[part] = _check_file(
                sources[part], target, method, asked=asked, heldout=part == "validation", tick=tick
            )
        except InvalidFileError as error:
            param = error.param or f"{part}_file"
            raise InvalidFileError(f"{param}: {error}", param=param) from None
    return counts


def _check_file(
    source: Path,
    target: Path,
    method: str,
    *,
    asked: dict[bytes, int],
    heldout: bool,
    tick: Callable[[], None],
) -> int:
    """Check and place one file; ``asked`` has the line of each question of the validation file."""
    count, written, rewrites = 0, 1, method == "reinforcement"
    with target.open("wb") if rewrites else nullcontext() as out:
        for line, row, examples in read_lines(source, method, tick=tick):
            count += len(examples)
            for example in examples:
                question = blake2b(split_key(example).encode(), digest_size=16).digest()
                if heldout:
                    asked.setdefault(question, line)
                elif late := asked.get(question):
                    raise InvalidFileError(
                        f"line {late}: its first user message is also in line {line} of "
                        "training_file. Remove the row from one of the files.",
                        param="validation_file",
                    )
            if out:  # blank lines are kept, so that messages name the lines of the source
                text = json.dumps(row, ensure_ascii=False).encode()
                out.write(b"\n" * (line - written) + text)
                written = line
    if count < (minimum := _fewest(method, heldout=heldout)):
        raise InvalidFileError(f"found {count} examples, expected at least {minimum}. Add more.")
    if not rewrites:
        os.link(source, target)
    return count


def _fewest(method: str, *, heldout: bool) -> int:
    """Return the fewest rows of a file; an interval of held-out rewards needs two."""
    if not heldout:
        return MIN_ROWS
    return 2 if method == "reinforcement" else 1


def read_lines(
    path: Path, method: str, *, tick: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, dict[str, Any], Sequence[Example]]]:
    """Yield line, row and examples of each row, which is read as its stage will read it.

    Raises:
        InvalidFileError: names the first line that is wrong, by the API's rules or the stage's.
    """
    detector, since = FormatDetector("auto", kind=READ_AS[method][0]), 0
    with path.open("rb") as f:
        for line, raw in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), start=1):
            if (since := since + len(raw)) > TICK_BYTES:
                since = 0
                tick()
            try:
                if row := _row(raw.removeprefix(BOM_UTF8) if line == 1 else raw, method):
                    yield line, row, _examples(row, method, detector, line=line)
            except InvalidFileError as error:
                raise InvalidFileError(f"line {line}: {error}", param=error.param) from None


def _row(raw: bytes, method: str) -> dict[str, Any] | None:
    """Return the row of a line, with the keys that the stage reads; None of a blank line."""
    if len(raw) > MAX_LINE:
        raise InvalidFileError(f"longer than {MAX_LINE} bytes")
    row, _ = next(parse_lines(raw, 1, SOURCE), (None, ""))
    if row is None:
        return None
    if not isinstance(row, dict):
        told = PLACE.sub("", str(row))
        raise InvalidFileError(f"{told}. Write one JSON object per line, in UTF-8.")
    if problem := CHECKS[method](row):
        raise InvalidFileError(problem)
    if method != "reinforcement":
        return row
    columns = {key: value for key, value in row.items() if key != "messages"}
    # One column of text: rows may have different keys, or one key with different types.
    item = json.dumps(columns, ensure_ascii=False)
    try:
        item.encode()
    except UnicodeEncodeError as error:
        half = f"{item[error.start]!r}, in {item[:40]!r}"
        raise InvalidFileError(
            f"half of a surrogate pair, {half}. Write whole characters."
        ) from None
    return {"prompt": row["messages"], "item": item}


def _examples(
    row: dict[str, Any], method: str, detector: FormatDetector, *, line: int
) -> Sequence[Example]:
    """Return the examples of a row by the rules of the stage; none if its weight is 0."""
    kind, names = READ_AS[method]
    source = f"{SOURCE}:{line}"
    try:
        form = detector.format_of(row, source)
        return to_examples(row, kind=kind, format=form, source=source)
    except DataError as error:
        told = PLACE.sub("", str(error).splitlines()[0])
        told = re.sub(r"^\w+", lambda part: names.get(part[0], part[0]), told)
        told = told.replace(f"{SOURCE}:", "line ")
        raise InvalidFileError(f"{told}. Correct or remove the row.") from None


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
