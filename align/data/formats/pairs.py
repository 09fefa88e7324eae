"""Create the pair of a preference row: find its prompt and the two responses."""

import re
from dataclasses import replace
from math import isfinite
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Text, Turn
from align.data.formats.tools import parsed
from align.data.formats.turns import is_nothing, plain_name, shown

Row = dict[str, Any]

_SPEAKER = re.compile(
    r"^\W*(?:assistant|ai|bot|gpt|chatgpt)\W*:|<\|assistant\|>|<\|im_start\|>assistant|\[/INST\]",
    re.IGNORECASE | re.MULTILINE,
)
"""The beginning of a response in a dialogue that is written as one text."""
_SCORES = ("score", "rating", "reward")


def make_pair(
    prompt: Text, chosen: Text, rejected: Text, *, row: Row, rest: Row, source: str
) -> Example:
    """Return the example of a pair, with the margin of its row."""
    return Example(
        prompt, chosen, rejected, margin=_margin(row, source), columns=rest, source=source
    )


def explicit_pair(
    prompt: Text, chosen: Text, rejected: Text, *, row: Row, rest: Row, source: str
) -> Example:
    """Return a pair with an explicit prompt, which the responses may repeat.

    Raises:
        DataError: only one side repeats the prompt, or a side begins with something else.
    """
    if isinstance(prompt, str) and isinstance(chosen, str):
        return make_pair(prompt, chosen, rejected, row=row, rest=rest, source=source)
    asked = as_turns(prompt, "user")
    sides = [as_turns(side, "assistant") for side in (chosen, rejected)]
    # Some datasets repeat the prompt in both sides, others give the responses alone.
    repeats = [side[: len(asked)] == asked for side in sides]
    if any(repeats):
        if not all(repeats):
            raise DataError(
                f"{source}: only one of chosen and rejected repeats the prompt", code="D071"
            )
        sides = [side[len(asked) :] for side in sides]
    elif any(side[0]["role"] != "assistant" for side in sides):
        if _whole_dialogue(asked, sides):
            return implicit_pair(sides[0], sides[1], row=row, rest=rest, source=source)
        raise DataError(
            f"{source}: chosen and rejected begin neither with the prompt nor a response",
            code="D071",
        )
    return make_pair(asked, sides[0], sides[1], row=row, rest=rest, source=source)


def _whole_dialogue(asked: list[Turn], sides: list[list[Turn]]) -> bool:
    """Return whether both sides begin with the same turns, of which the prompt repeats the last.

    Rows of this kind have a system turn, or earlier turns, in both sides alone.
    """
    count = next((i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), 0)
    before = sides[0][:count]
    while before and before[-1]["role"] == "assistant":
        before.pop()
    return len(before) > len(asked) and before[-len(asked) :] == asked


def implicit_pair(chosen: Text, rejected: Text, *, row: Row, rest: Row, source: str) -> Example:
    """Return a pair whose prompt is the common prefix of both sides.

    Raises:
        DataError: there is no common prefix, or the sides differ before the response.
    """
    both: tuple[Any, Any] = (chosen, rejected)
    pairs = enumerate(zip(chosen, rejected, strict=False))
    count = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str):
        # Go back to a word boundary, so that no word is split between prompt and response.
        while 0 < count < len(chosen) and not chosen[count].isspace():
            count -= 1
        first, second = (_SPEAKER.search(side, count) for side in both)
        if first and second:
            raise DataError(
                f"{source}: chosen and rejected differ before the response: after their common "
                f"beginning, both have {shown(first[0].strip())}. Write the prompt into a field "
                "'prompt' and leave only the responses, or write both as lists of turns",
                code="D071",
            )
    else:
        while count and chosen[count - 1]["role"] == "assistant":
            count -= 1  # a common prefix of the responses belongs to the responses
        if any(side[count : count + 1] and side[count]["role"] != "assistant" for side in both):
            raise DataError(
                f"{source}: the prompts of chosen and rejected differ at turn {count}", code="D071"
            )
    if count == 0:
        raise DataError(
            f"{source}: chosen and rejected have no common prefix, so there is no prompt. "
            "Add a field 'prompt'.",
            code="D072",
        )
    return make_pair(
        chosen[:count], chosen[count:], rejected[count:], row=row, rest=rest, source=source
    )


def _margin(row: Row, source: str) -> float | None:
    # Cells of a table are text, and empty ones are nothing.
    given = {name: parsed(row.get(name)) for name in ("margin", "score_chosen", "score_rejected")}
    given = {name: value for name, value in given.items() if not is_nothing(value)}
    if "margin" in given:
        value = given["margin"]
    elif "score_chosen" in given and "score_rejected" in given:
        both = (given["score_chosen"], given["score_rejected"])
        value = both[0] - both[1] if all(isinstance(v, int | float) for v in both) else both
    else:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise DataError(f"{source}: margin: expected a number, found {shown(value)}", code="D074")
    return float(value)


def score_gap(example: Example) -> float | None:
    """Return how much higher the chosen response is scored; None if the pair has no scores.

    It is the margin, or the difference of ``chosen_rating`` and ``rejected_rating`` or the like.
    """
    if example.margin is not None:
        return example.margin
    found = {plain_name(key): value for key, value in example.columns.items()}
    for score in _SCORES:
        names = ((f"chosen_{score}", f"rejected_{score}"), (f"{score}_chosen", f"{score}_rejected"))
        for chosen, rejected in names:
            if chosen in found and rejected in found:
                both = parsed(found[chosen]), parsed(found[rejected])
                if all(isinstance(v, int | float) and isfinite(v) for v in both):
                    return both[0] - both[1]
    return None


def as_chat(example: Example) -> Example:
    """Return an example whose plain prompt and responses are converted to turns."""
    if not isinstance(example.prompt, str) or not example.prompt:
        return example
    completion, rejected = (
        None if side is None else as_turns(side, "assistant")
        for side in (example.completion, example.rejected)
    )
    asked = as_turns(example.prompt, "user")
    return replace(example, prompt=asked, completion=completion, rejected=rejected)


def as_turns(text: Text, role: str) -> list[Turn]:
    """Return a text as a list with one turn; turns are returned unchanged."""
    return [Turn(role=role, content=text)] if isinstance(text, str) else list(text)
