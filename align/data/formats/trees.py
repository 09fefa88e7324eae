"""Convert the message trees of Open Assistant: branches for sft, ranked replies as pairs."""

from typing import Any

from align.core.errors import DataError
from align.core.types import Example, Turn
from align.data.formats.pairs import make_pair
from align.data.formats.questions import objects_field, other_fields, text_field
from align.data.formats.turns import shown

Row = dict[str, Any]


def from_oasst_best(row: Row, source: str) -> list[Example]:
    """Read the best-ranked branch of an OASST tree, up to its last assistant turn."""
    turns: list[Turn] = []
    node: Row | None = _node(row["prompt"], source)
    while node is not None:
        turns.append(_oasst_turn(node, source))
        node = next(iter(_ranked(node, source)), None)
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    rest = other_fields(row, "prompt")
    return [Example(prompt=[], completion=turns, columns=rest, source=source)] if turns else []


def from_oasst_pairs(row: Row, source: str) -> list[Example]:
    """Read the best against the worst reply at every ranked assistant branch of an OASST tree."""
    rest = other_fields(row, "prompt")
    pairs: list[Example] = []
    # Breadth-first search over the tree, with the turns before each node.
    branches: list[tuple[list[Turn], Row]] = [([], _node(row["prompt"], source))]
    while branches:
        before, node = branches.pop(0)
        turns = [*before, _oasst_turn(node, source)]
        replies = _ranked(node, source)
        said = [r for r in replies if r.get("role") == "assistant" and r.get("rank") is not None]
        if len(said) > 1:
            best, worst = ([_oasst_turn(said[i], source)] for i in (0, -1))
            if best != worst:
                pairs.append(make_pair(turns, best, worst, row={}, rest=rest, source=source))
        branches += [(turns, reply) for reply in replies]
    return pairs


def _node(value: object, source: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f"{source}: prompt: expected a message with replies, found {shown(value)}", code="D050"
        )
    return value


def _ranked(node: Row, source: str) -> list[Row]:
    """Return the usable replies, best first; unranked ones keep their order at the end."""
    # In a typed table, a message without replies has null.
    listed = node if node.get("replies") is not None else {"replies": []}
    replies = [r for r in objects_field(listed, "replies", source) if not r.get("deleted")]
    return sorted(replies, key=lambda r: r["rank"] if r.get("rank") is not None else 10**6)


def _oasst_turn(node: Row, source: str) -> Turn:
    role = {"prompter": "user", "assistant": "assistant"}.get(node.get("role", ""))
    if role is None:
        raise DataError(
            f"{source}: role {node.get('role')!r}: expected prompter or assistant", code="D053"
        )
    return Turn(role=role, content=text_field(node, "text", source))
