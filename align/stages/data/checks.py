"""Preflight checks of the data stages: rows, scores and votes."""

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
"""Rows that are scored before a stage starts: enough for a warning, too few for a failure."""


def row_check(examples: Sequence[Example]) -> Check:
    """Return the check that reports the rows; faulty rows have already stopped the load."""

    def rows() -> Finding:
        counts = [len(answer_text(example).split()) for example in examples]
        return Finding(
            f"{len(examples):,} rows, responses of {min(counts)} to {max(counts)} words, "
            f"median {np.median(counts):g}"
        )

    return "rows", rows


def words_check(spec: CurateStage, examples: Sequence[Example]) -> list[Check]:
    """Return the check that the bounds on words keep some rows."""
    if spec.words is None:
        return []
    bounds = spec.words

    def fitting() -> Finding:
        most = bounds.max or float("inf")
        counts = [len(answer_text(example).split()) for example in examples]
        # Of all rows, not of a sample: a rare length may be the one that is wanted.
        kept = sum(bounds.min <= count <= most for count in counts)
        return Finding(
            f"{kept:,} of {len(counts):,} responses have {bounds.min} to {bounds.max} words",
            "more than 0",
            "ok" if kept else "fail",
            "no row would be kept. Change 'words'",
        )

    return [("words", fitting)]


def score_checks(label: str, by_name: Mapping[str, Scores]) -> list[Check]:
    """Return one check per score: it can score these rows, and the scores differ."""
    return [(f"{label} {name}", partial(scored, scores)) for name, scores in by_name.items()]


def scored(scores: Scores) -> Finding:
    """Return the number of scored rows and the range of the scores."""
    known = [score for score in scores if score is not None]
    value = f"{len(known)} of {len(scores)} rows scored"
    if not known:
        return Finding(
            value, "all", "warn", "none of these rows can be scored; they will be dropped"
        )
    value += f", from {min(known):.3g} to {max(known):.3g}"
    if len(known) < len(scores):
        return Finding(value, "all", "warn", "rows that cannot be scored will be dropped")
    if len(known) > 1 and min(known) == max(known):
        return Finding(value, "different scores", "warn", "all rows get the same score")
    return Finding(value, "all")


def vote_checks(names: Sequence[str], votes: NDArray[np.int64]) -> list[Check]:
    """Return the checks of the votes, given as (rows, voters) of 0, 1 or ABSTAIN."""
    found: list[Check] = [
        (f"votes of {name}", partial(voted, votes[:, j])) for j, name in enumerate(names)
    ]

    def any_vote() -> Finding:
        rows = int((votes != ABSTAIN).any(axis=1).sum())
        return Finding(
            f"{rows} of {len(votes)} rows have a vote",
            "more than 0",
            "ok" if rows else "warn",
            "no function votes on these rows. Check good_from, bad_below and min_gap",
        )

    return [*found, ("votes", any_vote)]


def voted(column: NDArray[np.int64]) -> Finding:
    """Return the vote counts of one voter."""
    counts = Counter(column.tolist())
    value = f"{counts[1]} for, {counts[0]} against, {counts[ABSTAIN]} without a vote"
    silent = counts[ABSTAIN] == len(column)
    return Finding(
        value,
        "some votes",
        "warn" if silent else "ok",
        "it votes on none of these rows. Check its bounds and its column",
    )


def answers_of(examples: Sequence[Example]) -> list[Text]:
    """Return the (chosen) responses."""
    return [e.completion for e in examples if e.completion is not None]
