"""Find held-out prompts whose words occur in the training texts.

The split keeps a prompt on one side by its exact first message, but a quoted or slightly changed
copy passes it. Here, a held-out prompt is contaminated if most of its 13-word runs occur in
training texts. A prompt of 8 to 12 words is contaminated if a training turn has exactly its words.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from align.core.types import Example, Text
from align.data.text.ngrams import grams, words

GRAM_WORDS = 13
"""As in arXiv:2005.14165 appendix C."""
MIN_WORDS = 8
"""Shorter prompts are too common to be evidence."""
SHARE = 0.8
"""Fraction of a prompt's runs that must occur in training, so a common preamble does not count.
The limit is that of arXiv:2307.09288 section A.6 for its worst class."""
NUM_NOTED = 10
Place = tuple[str, str]
"""A contaminated held-out row, and the training row that shares most of its words."""
Wanted = tuple[str, set[int]]
"""A held-out row and its runs of words, or a training row and those of them that it contains."""


@dataclass(frozen=True, slots=True)
class Contamination:
    """Result of an overlap check.

    Attributes:
        checked: number of held-out prompts that are long enough.
        skipped: number of prompts with fewer than 8 words.
        places: the contaminated prompts.
    """

    checked: int
    skipped: int
    places: Sequence[Place]

    @property
    def frac(self) -> float:
        """Return the contaminated fraction of the checked prompts."""
        return len(self.places) / self.checked if self.checked else 0.0

    def note(self) -> dict[str, Any]:
        """Return the entry of a manifest."""
        return {
            "checked": self.checked,
            "contaminated": len(self.places),
            "frac": round(self.frac, 4),
            "too_short": self.skipped,
            "first": [list(both) for both in self.places[:NUM_NOTED]],
        }


def find_contamination(
    train: Sequence[Example], heldout: Mapping[str, Sequence[Example]]
) -> dict[str, Contamination]:
    """Compare sets of held-out prompts with every turn of the training rows.

    Args:
        train: rows of any kind.
        heldout: the sets, by name.
    """
    wanted = {name: wanted_runs(rows) for name, rows in heldout.items()}
    looked_for = set[int]().union(*(own for rows in wanted.values() for _, own in rows))
    # Collect only the runs that some held-out prompt contains, to bound memory.
    seen: set[int] = set()
    for _, runs in _runs_of(train, looked_for):
        seen |= runs
    found = {}
    for name, rows in wanted.items():
        # A prompt is contaminated if most of its runs occur somewhere, not necessarily in one row.
        bad = [(source, own) for source, own in rows if is_contaminated(own, seen)]
        skipped = len(heldout[name]) - len(rows)
        wanted_here = set[int]().union(*(own for _, own in bad))
        places = nearest_rows(bad, _runs_of(train, wanted_here))
        found[name] = Contamination(len(rows), skipped, places)
    return found


def is_contaminated(own: set[int], seen: Collection[int]) -> bool:
    """Return whether enough runs of a prompt are among those of the training texts."""
    return sum(run in seen for run in own) >= SHARE * len(own)


def wanted_runs(examples: Iterable[Example]) -> list[Wanted]:
    """Return the source and word runs of the prompts that are long enough."""
    found = []
    for example in examples:
        hashes = [words(turn) for turn in _asked(example)]
        if sum(map(len, hashes)) >= MIN_WORDS:
            found.append((example.source, set().union(*map(_runs, hashes))))
    return found


def runs_in(example: Example, wanted: Set[int]) -> set[int]:
    """Return the wanted runs that occur in any turn of a training row."""
    turns = _turns(example.prompt, example.completion, example.rejected)
    return set[int]().union(*(_runs(words(turn)) & wanted for turn in turns))


def nearest_rows(contaminated: Sequence[Wanted], rows: Iterable[Wanted]) -> list[Place]:
    """Return, for each contaminated prompt, the training row that has most of its runs."""
    best = [(0, "")] * len(contaminated)
    owners: dict[int, list[int]] = {}
    for i, (_, own) in enumerate(contaminated):
        for run in own:
            owners.setdefault(run, []).append(i)
    # A second pass over the training rows, only for the few contaminated prompts.
    for source, runs in rows:
        for i, count in Counter(i for run in runs for i in owners.get(run, ())).items():
            if count > best[i][0]:
                best[i] = (count, source)
    return [(source, best[i][1]) for i, (source, _) in enumerate(contaminated)]


def _runs_of(examples: Sequence[Example], wanted: set[int]) -> Iterator[tuple[str, set[int]]]:
    """Yield the source and wanted runs of every distinct turn that has any."""
    known: set[int] = set()  # hashes, since the turns of millions of rows take gigabytes
    for example in examples if wanted else ():
        for turn in _turns(example.prompt, example.completion, example.rejected):
            if hash(turn) not in known:
                known.add(hash(turn))
                if runs := _runs(words(turn)) & wanted:
                    yield example.source, runs


def _runs(hashes: list[int]) -> set[int]:
    return grams(hashes, min(GRAM_WORDS, len(hashes)))


def _asked(example: Example) -> list[str]:
    """Return the user's text in a prompt, or in the whole conversation if there is no prompt."""
    text = example.prompt or example.completion
    if not text or isinstance(text, str):
        return list(_turns(example.prompt))
    return [turn["content"] for turn in text if turn["role"] == "user"]


def _turns(*texts: Text | None) -> Iterator[str]:
    for text in texts:
        if isinstance(text, str):
            yield text
        elif text:
            yield from (turn["content"] for turn in text)
