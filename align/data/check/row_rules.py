"""Warnings about one example: the order of turns, nearly equal pairs, and answers."""

from collections.abc import Iterator, Sequence

from align.core.types import Example, Text, Turn
from align.data.formats.faults import Fault
from align.data.formats.missing import may_be_missing
from align.data.formats.pairs import score_gap
from align.data.formats.turns import last_said, text_of


def doubts(example: Example, *, kind: str) -> Iterator[Fault]:
    """Yield the warnings of an example and, for ``math``, the errors of its answer."""
    yield from _order(example, kind)
    for side in (example.completion, example.rejected):
        if may_be_missing(said := last_said(side)):
            yield "D123", f"the whole response is {said.strip()!r}"
    if example.rejected is not None:
        yield from _pair(example)
    if kind == "math":
        yield from _answer(example)


def _order(example: Example, kind: str) -> Iterator[Fault]:
    turns = [turn for part in (example.prompt, example.completion) for turn in _turns(part)]
    if not turns:
        return
    before = turns[0]["role"]
    for i, turn in enumerate(turns[1:], start=1):
        role = turn["role"]
        if role == before and role in ("user", "assistant"):
            yield "D064", f"turns {i - 1} and {i} both have role {role}"
        elif role in ("system", "developer"):
            yield "D065", f"turn {i} has role {role}"
        before = role
    if kind == "sft" and before == "user":
        yield "D063", f"turn {len(turns) - 1} is a question without a response"


def _turns(text: Text | None) -> Sequence[Turn]:
    return text if text and not isinstance(text, str) else []


def _pair(example: Example) -> Iterator[Fault]:
    chosen, rejected = text_of(example.completion), text_of(example.rejected)
    # Only responses of similar length can have the same words, so most pairs skip the comparison.
    if len(chosen) - len(rejected) in range(-20, 21):
        both = [" ".join(side.lower().split()) for side in (chosen, rejected)]
        if both[0] == both[1]:
            yield "D076", "chosen and rejected have the same words"
    gap = score_gap(example)
    if gap is not None and gap <= 0:
        yield "D077", f"the chosen response scores {gap:+g}" if gap else "both score the same"


def _answer(example: Example) -> Iterator[Fault]:
    from reward_models.base import InvalidScoreError
    from reward_models.math import reference_number

    answer = example.columns.get("answer")
    if answer is None or answer == "":
        yield "D082", f"no 'answer' among the columns {sorted(example.columns)}"
        return
    try:
        reference_number(answer)
    except InvalidScoreError as error:
        yield "D083", f"answer {str(answer)[:60]!r}: {error}"
