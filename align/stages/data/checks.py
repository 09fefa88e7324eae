"""Checks before a stage that makes data: its rows, and that its scores tell them apart."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from align.core.types import Example, Text
from align.data.text.label_model import ABSTAIN
from align.preflight.checks import Check, Finding
from align.recipe.schema import CurateStage
from align.stages.data.rows import answer_text

Scores = Sequence[float | None]
NUM_SCORED = 16
"""Rows that are scored before a stage begins: too few to stop it, enough for a warning."""


def row_check(examples: Sequence[Example]) -> Check:
    """Give the check on what came in; faulty rows have stopped the load already."""

    def rows() -> Finding:
        counts = [len(answer_text(example).split()) for example in examples]
        return Finding(
            f"{len(examples):,} rows, answers of {min(counts)} to {max(counts)} words, "
            f"{np.median(counts):g} in the middle"
        )

    return "rows", rows


def words_check(spec: CurateStage, examples: Sequence[Example]) -> list[Check]:
    """Give the check that the bounds on words leave something."""
    if spec.words is None:
        return []
    bounds = spec.words

    def fitting() -> Finding:
        most = bounds.max or float("inf")
        counts = [len(answer_text(example).split()) for example in examples]
        kept = sum(bounds.min <= count <= most for count in counts)
        return Finding(
            f"{kept:,} of {len(counts):,} answers lie between {bounds.min} and {bounds.max} words",
            "more than 0",
            "ok" if kept else "fail",
            "no row would stay; look at 'words'",
        )

    return [("words", fitting)]


def score_checks(label: str, by_name: Mapping[str, Scores]) -> list[Check]:
    """Give one check for each score: that it scores these rows, and not all of them alike."""
    return [(f"{label} {name}", partial(scored, scores)) for name, scores in by_name.items()]


def scored(scores: Scores) -> Finding:
    """Count the scores and say how far they reach."""
    known = [score for score in scores if score is not None]
    value = f"{len(known)} of {len(scores)} rows scored"
    if not known:
        return Finding(value, "all", "warn", "it can score none of these rows, which will leave")
    value += f", from {min(known):.3g} to {max(known):.3g}"
    if len(known) < len(scores):
        return Finding(value, "all", "warn", "rows that it cannot score will leave")
    if len(known) > 1 and min(known) == max(known):
        return Finding(value, "different scores", "warn", "it tells no rows apart")
    return Finding(value, "all")


def vote_checks(names: Sequence[str], votes: NDArray[np.int64]) -> list[Check]:
    """Give the checks that the voters vote: (rows, voters) of 0, 1 or ABSTAIN."""
    found: list[Check] = [
        (f"votes of {name}", partial(voted, votes[:, j])) for j, name in enumerate(names)
    ]

    def any_vote() -> Finding:
        rows = int((votes != ABSTAIN).any(axis=1).sum())
        return Finding(
            f"{rows} of {len(votes)} rows have a vote",
            "more than 0",
            "ok" if rows else "warn",
            "no function votes on these rows; look at good_from, bad_below and min_gap",
        )

    return [*found, ("votes", any_vote)]


def voted(column: NDArray[np.int64]) -> Finding:
    """Count the votes of one voter."""
    counts = Counter(column.tolist())
    value = f"{counts[1]} for, {counts[0]} against, {counts[ABSTAIN]} without a vote"
    silent = counts[ABSTAIN] == len(column)
    return Finding(
        value,
        "some votes",
        "warn" if silent else "ok",
        "it votes on none of these rows; look at its bounds and its column",
    )


def answers_of(examples: Sequence[Example]) -> list[Text]:
    """Give the (chosen) answers."""
    return [e.completion for e in examples if e.completion is not None]
