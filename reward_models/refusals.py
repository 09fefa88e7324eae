"""Detect refusals by their opening words."""

import re

from reward_models.base import Rule, rule_from_spec
from reward_models.specs import RefusalSpec

OPENING_CHARACTERS = 160
"""A refusal appears at the start; a later "I cannot" usually belongs to a normal response."""
_DECLINES = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable|not able|afraid)\b"
    r"|\bI (?:cannot|can't|can not|won't|will not)\b"
    r"|\bI (?:must|have to) decline\b|\bas an AI\b|\bmy apologies\b|\bI apologi[sz]e\b",
    re.IGNORECASE,
)


def declines(answer: str) -> bool:
    """Return whether a response opens with a phrase of refusal; a heuristic for English."""
    return _DECLINES.search(answer[:OPENING_CHARACTERS].replace("\u2019", "'")) is not None


def refusal(spec: RefusalSpec) -> Rule:
    """Score 1 if a response declines exactly when the column's value asks for it."""
    wanted = {str(value) for value in spec.declines}

    def score(answer: str, value: object) -> float:
        return float(declines(answer) == (str(value) in wanted))

    return rule_from_spec(spec, score, column=spec.column)


def refusing_side(chosen: str, rejected: str) -> str:
    """Return the side of a pair that declines: neither, chosen, rejected or both."""
    sides = (declines(chosen), declines(rejected))
    return {(False, False): "neither", (True, False): "chosen", (False, True): "rejected"}.get(
        sides, "both"
    )
