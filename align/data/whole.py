"""Faults of a data source that no single row shows: joined splits, pairs the wrong way round.

Also counted are rows that are trained although they may not be meant to be.
"""

from collections import Counter
from collections.abc import Iterator

from align.core.errors import DataError
from align.core.types import Example
from align.data.formats.missing import may_be_missing
from align.data.formats.pairs import score_gap
from align.data.formats.turns import last_said, plain_name
from align.data.reading.splits import SPLIT_OF
from align.recipe.schema.formats import Kind, as_boolean

Found = tuple[str, str]
"""Code (an entry of align/data/check/codes.yaml) and what was found."""

_SPLIT_COLUMNS = ("split", "splits", "data_split", "dataset_split", "partition", "subset", "set")
_SPLIT_COLUMNS += ("fold", "phase", "usage")


class WholeSource:
    """Counts over all rows of a source; the counts of its parts can be added."""

    def __init__(self) -> None:
        self.gaps: Counter[str] = Counter()
        """Number of pairs by the response with the higher score; "" for pairs without scores."""
        self.missing: Counter[str] = Counter()
        """Number of responses that consist of a word for a missing value, by that word."""
        self.verdicts: dict[str, Counter[bool] | None] = {}
        """Trues and falses of each column beside responses to train; None for other columns."""
        self._splits: dict[str, set[str]] = {}
        self._others: set[str] = set()

    def add(self, example: Example) -> None:
        """Count an example as it was read."""
        for key, value in example.columns.items():
            if key not in self._others and value not in (None, ""):
                split = SPLIT_OF.get(value.lower()) if isinstance(value, str) else None
                if split is None or plain_name(key) not in _SPLIT_COLUMNS:
                    self._others.add(key)
                else:
                    self._splits.setdefault(key, set()).add(split)
        for side in (example.completion, example.rejected):
            if may_be_missing(said := last_said(side)):
                self.missing[said.strip()] += 1
        if example.completion is not None and example.rejected is None and example.label is None:
            self._count_verdicts(example)
        if example.rejected is not None:
            gap = score_gap(example)
            better = "chosen" if gap and gap > 0 else "rejected" if gap else "neither"
            self.gaps["" if gap is None else better] += 1

    def _count_verdicts(self, example: Example) -> None:
        for key, value in example.columns.items():
            if value is None or value == "" or self.verdicts.get(key, True) is None:
                continue
            said = as_boolean(value)
            counts = self.verdicts.setdefault(key, Counter())
            if said is None or counts is None:
                self.verdicts[key] = None
            else:
                counts[said] += 1

    def join(self, other: "WholeSource") -> None:
        """Add the counts of another part of the source."""
        self.gaps += other.gaps
        self.missing += other.missing
        for key, counts in other.verdicts.items():
            mine = self.verdicts.setdefault(key, Counter())
            self.verdicts[key] = None if mine is None or counts is None else mine + counts
        self._others |= other._others
        for key, splits in other._splits.items():
            self._splits.setdefault(key, set()).update(splits)

    def faults(self) -> Iterator[Found]:
        """Yield the faults for which a stage refuses the source."""
        for key, splits in self._splits.items():
            if len(splits) > 1 and key not in self._others:
                yield (
                    "D013",
                    f"{key}: by this column, the rows are of the splits {', '.join(sorted(splits))}"
                    ", which are never joined; write each split into a file of its own, keep one "
                    "of them (map: FILE.py:NAME), or rename the column to use all rows "
                    f"(rename: {{{key}: {key}_column}})",
                )
        worse = self.gaps["rejected"]
        if 2 * worse > self.gaps.total():
            yield (
                "D079",
                f"in {worse} of {self.gaps.total()} pairs, the rejected response has the "
                "higher score; swap the sides (rename: {chosen: rejected, rejected: chosen}, and "
                "their scores likewise), or rename the scores if a lower one is better",
            )

    def doubts(self, *, kind: Kind) -> Iterator[str]:
        """Yield the warnings that a stage logs."""
        if self.missing:
            words = ", ".join(f"{word!r} ({count})" for word, count in self.missing.items())
            yield (
                f"responses that are only {words} are trained as such; remove the rows in which "
                "that is a missing value (map)"
            )
        if kind == "sft":
            yield from self.unused_verdicts()
        for side, said in (("rejected", "a higher score"), ("neither", "the same score")):
            if count := self.gaps[side]:
                yield (
                    f"in {count} of {self.gaps.total()} pairs, the rejected response has {said}; "
                    "align data check lists them (D077)"
                )

    def unused_verdicts(self) -> Iterator[str]:
        """Yield the columns of true and false that may rate responses, all of which are trained."""
        for key, counts in self.verdicts.items():
            if counts and len(counts) > 1:
                yield (
                    f"{key}: false in {counts[False]} of {counts.total()} rows, all of which are "
                    "trained; if it rates the responses, keep those that are to be learned "
                    f"(map: FILE.py:NAME), or train on both with kto (rename: {{{key}: label}})"
                )


def check_whole(whole: WholeSource, *, name: str) -> None:
    """Raise the first fault of a source.

    Raises:
        DataError: its splits would be joined, or most of its pairs are the wrong way round.
    """
    for code, found in whole.faults():
        raise DataError(f"{name}: {found}", code=code)
