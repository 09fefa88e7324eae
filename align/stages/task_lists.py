"""How tasks are laid out for a model that goes on with them, what it said, and what is refused."""

import string
from collections.abc import Sequence
from typing import Any

from align.core.types import Completion
from align.data.check.words import word_texts
from align.data.novelty import nearest
from align.recipe.schema import SelfInstructStage


def list_prompt(tasks: Sequence[dict[str, Any]], spec: SelfInstructStage) -> str:
    """Lay out a list of tasks that ends where the next instruction begins."""
    item = spec.wording.item
    lines = [
        item.replace("{number}", str(i)).replace("{instruction}", task["instruction"])
        for i, task in enumerate(tasks, start=1)
    ]
    opening = item.partition("{instruction}")[0].replace("{number}", str(len(tasks) + 1))
    # Tokenizers join a space to the word after it: it is the model's to write.
    return (spec.wording.head + "".join(lines) + opening).rstrip(" ")


def first_item(completion: Completion, spec: SelfInstructStage) -> tuple[str, bool]:
    """Give what the model wrote up to the end of the item, and whether the item ended."""
    text, end, _ = completion.text.partition(spec.wording.item.partition("{instruction}")[2])
    return one_line(text), bool(end) or completion.finish_reason == "stop"


def refusal(
    text: str, whole: bool, known: Sequence[dict[str, Any]], spec: SelfInstructStage
) -> tuple[str | None, dict[str, Any]]:
    """Say why an instruction is refused, or None; and how near the nearest known one is."""
    found = word_texts(text)
    if not whole:
        return "cut", {}
    if len(found) < spec.min_words:
        return "too short", {}
    if len(found) > spec.max_words:
        return "too long", {}
    if text[0] in string.punctuation:
        return "begins with punctuation", {}
    unfit = sorted(set(found) & {word.lower() for word in spec.refuse_words})
    if unfit:
        return "not for a text model", {"words": unfit}
    place, value = nearest(found, [word_texts(task["instruction"]) for task in known])
    details = {"rouge_l": round(value, 4), "nearest": known[place]["name"] if place >= 0 else None}
    return ("like a known one" if value >= spec.novelty else None), details


def finished(completion: Completion, spec: SelfInstructStage) -> tuple[str, bool]:
    """Give the answer, and whether the model ended it."""
    if spec.answer == "chat":
        return completion.text.strip(), completion.finish_reason == "stop"
    text, end, _ = completion.text.partition(spec.wording.solved.partition("{answer}")[2])
    return text.strip(), bool(end) or completion.finish_reason == "stop"


def one_line(text: str) -> str:
    """Give a text on one line, its words a space apart."""
    return " ".join(text.split())
