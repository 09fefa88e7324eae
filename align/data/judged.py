"""Read rows whose answers, or the steps of them, are judged one by one."""

from collections.abc import Mapping
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text, Turn
from align.data.turns import not_text, shown, to_text

Row = dict[str, Any]


def from_steps(row: Row, source: str) -> list[Example]:
    """Read ``prompt`` and ``steps`` of ``{text, label}``, or TRL's ``completions`` and ``labels``.

    The example's columns ``steps`` and ``step_labels`` hold the texts and whether each is right;
    a prompt that is a string is one turn of the user.
    """
    texts, labels = _listed(row, source) if "steps" in row else _parallel(row, source)
    if not texts:
        raise DataError(f"{source}: steps: there is none", code="D050")
    for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise not_text(text, field=f"steps[{i}]", source=source)
        if not isinstance(label, bool):
            raise DataError(
                f"{source}: steps[{i}]: label: expected true or false, {shown(label)}", code="D080"
            )
    prompt: Text = to_text(row["prompt"], field="prompt", source=source)
    if isinstance(prompt, str):
        prompt = [Turn(role="user", content=prompt)]
    used = ("prompt", "steps", "completions", "labels")
    columns = {key: value for key, value in row.items() if key not in used}
    columns |= {"steps": texts, "step_labels": labels}
    answer = [Turn(role="assistant", content="\n".join(texts))]
    return [Example(prompt, answer, columns=columns, source=source)]


def _listed(row: Row, source: str) -> tuple[list[Any], list[Any]]:
    steps = row["steps"]
    if not isinstance(steps, list) or not all(isinstance(s, Mapping) for s in steps):
        raise DataError(
            f"{source}: steps: expected a list of {{text, label}}, found {shown(steps)}",
            code="D050",
        )
    return [s.get("text") for s in steps], [s.get("label") for s in steps]


def _parallel(row: Row, source: str) -> tuple[list[Any], list[Any]]:
    texts, labels = row["completions"], row["labels"]
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise DataError(
            f"{source}: completions and labels: expected two lists of equal length", code="D050"
        )
    return texts, labels


def from_labelled_solutions(row: Row, source: str) -> list[Example]:
    """Read nested ``{"solution", "is_correct"}``: each attempt with its outcome as label."""
    tried = {k: v for k, v in row.items() if isinstance(v, dict) and "is_correct" in v}
    rest = {key: value for key, value in row.items() if key not in tried and key != "question"}
    examples = []
    seen: set[str] = set()
    for name, attempt in tried.items():
        text, good = attempt.get("solution"), attempt["is_correct"]
        if not isinstance(text, str) or not isinstance(good, bool):
            raise DataError(f"{source}: {name}: expected a solution and true or false", code="D080")
        if text in seen:
            continue
        seen.add(text)
        prompt = [Turn(role="user", content=str(row["question"]))]
        answer = [Turn(role="assistant", content=text)]
        examples.append(Example(prompt, answer, label=good, columns=rest, source=source))
    return examples
