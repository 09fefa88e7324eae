"""How far labels can be trusted: speed, position bias, consistency, known answers, agreement."""

import json
import sqlite3
import statistics
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from statistics import NormalDist
from typing import Any

from align.serve.labels.tables import Project

_CANONICAL = {("left", 0): "a", ("right", 0): "b", ("left", 1): "b", ("right", 1): "a"}


def canonical(row: Mapping[str, Any] | sqlite3.Row) -> str:
    """Return the answer of a task independent of the order shown: a, b, tie, bad, good or steps."""
    if row["steps"] is not None:
        return row["steps"]
    return _CANONICAL.get((row["choice"], row["flipped"])) or row["choice"]


def majority(answers: Sequence[str]) -> str | None:
    """Return the answer that was given more often than any other; None without one."""
    first, *others = Counter(answers).most_common(2)
    return None if others and others[0][1] == first[1] else first[0]


@dataclass(frozen=True, slots=True)
class Rate:
    """A fraction with its 95 % interval (Wilson, 1927); ``value`` is None without trials."""

    hits: int
    trials: int

    @property
    def value(self) -> float | None:
        """Return the fraction."""
        return self.hits / self.trials if self.trials else None

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the bounds of the fraction; (0, 1) without trials."""
        if not self.trials:
            return 0.0, 1.0
        n, p = self.trials, self.hits / self.trials
        z = NormalDist().inv_cdf(0.5 + level / 2)
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - reach), min(1.0, middle + reach)


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Return Krippendorff's alpha for nominal values: 1 - observed / expected disagreement.

    Args:
        units: the values that were given to each item, without missing ones. Items with fewer than
            two values do not count.

    Returns:
        1 for complete agreement, about 0 for labels by chance; None if no item has two values. One
        and the same value everywhere counts as complete agreement.

    Reference: Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section C.
    """
    paired = [Counter(unit) for unit in units if len(unit) >= 2]
    if not paired:
        return None
    totals: Counter[Hashable] = Counter()
    for counts in paired:
        totals.update(counts)
    n = totals.total()
    # Ordered pairs of different values within a unit of m values, each weighted by 1 / (m - 1).
    observed = sum(
        (m * m - sum(c * c for c in counts.values())) / (m - 1)
        for counts in paired
        for m in (counts.total(),)
    )
    expected = (n * n - sum(c * c for c in totals.values())) / (n - 1)
    return 1.0 if expected == 0 else 1.0 - observed / expected


def agreement(units: Iterable[Sequence[Hashable]]) -> Rate:
    """Return how many pairs of labels of the same item are equal."""
    hits = trials = 0
    for unit in units:
        counts, m = Counter(unit), len(unit)
        trials += m * (m - 1) // 2
        hits += sum(c * (c - 1) // 2 for c in counts.values())
    return Rate(hits, trials)


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Return Cohen's kappa of two annotators: their agreement beyond chance.

    Args:
        pairs: the two answers to each item that both have labeled.

    Returns:
        1 for complete agreement, about 0 for chance; None without items. Chance is the
        agreement of annotators who draw at random from their own answers. If all answers are the
        same, the result is 1.

    Reference: Cohen (1960), A Coefficient of Agreement for Nominal Scales.
    """
    n = len(pairs)
    if not n:
        return None
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    observed = sum(a == b for a, b in pairs) / n
    expected = sum(first[answer] * second[answer] for answer in first) / (n * n)
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


@dataclass(frozen=True, slots=True)
class PairQuality:
    """How two annotators agree on the items that both have labeled.

    Attributes:
        first: pseudonym of one.
        second: pseudonym of the other.
        agreement: how often the answers are equal.
        kappa: Cohen's kappa.
    """

    first: str
    second: str
    agreement: Rate
    kappa: float | None


@dataclass(frozen=True, slots=True)
class AnnotatorQuality:
    """What the labels of one annotator say about the annotator.

    Attributes:
        pseudonym: such as annotator-1.
        name: of the annotator; it is not exported.
        labels: number of answers, gold and repeated items included.
        skipped: number of skipped items.
        seconds: median per answer; None without answers.
        left: how often the left response won, of the pairs that have a winner.
        repeats: how often a repeated item got the same answer.
        gold: how often the known answer was given.
    """

    pseudonym: str
    name: str
    labels: int
    skipped: int
    seconds: float | None
    left: Rate
    repeats: Rate
    gold: Rate


@dataclass(frozen=True, slots=True)
class Quality:
    """The quality of a project's labels.

    Attributes:
        annotators: each of them.
        alpha: Krippendorff's alpha of all labels but gold and repeated ones.
        agreement: equal pairs of labels among them.
        items: number of items that need labels.
        labeled: those of them with all labels.
        labels: number of labels but gold and repeated ones.
        wins: of each model against the other of a pair; ties count for neither.
        pairs: every two annotators who have labeled the same items.
    """

    annotators: Sequence[AnnotatorQuality]
    alpha: float | None
    agreement: Rate
    items: int
    labeled: int
    labels: int
    wins: Mapping[tuple[str, str], Rate]
    pairs: Sequence[PairQuality]


_DONE = (
    "SELECT t.*, i.gold, i.models FROM label_tasks t JOIN label_items i ON i.id = t.item_id "
    "WHERE i.project_id = ? AND t.state = 'done' ORDER BY t.id"
)
_SKIPPED = (
    "SELECT t.annotator_id, count(*) FROM label_tasks t JOIN label_items i ON i.id = t.item_id "
    "WHERE i.project_id = ? AND t.state = 'skipped' GROUP BY t.annotator_id"
)


def quality_of(db: sqlite3.Connection, project: Project) -> Quality:
    """Return the quality of a project's labels so far."""
    rows = db.execute(_DONE, (project.id,)).fetchall()
    skipped = dict(map(tuple, db.execute(_SKIPPED, (project.id,))))
    annotators = db.execute(
        "SELECT * FROM label_annotators WHERE project_id = ? ORDER BY number", (project.id,)
    ).fetchall()
    units: defaultdict[int, list[str]] = defaultdict(list)
    for row in rows:
        if row["purpose"] == "label":
            units[row["item_id"]].append(canonical(row))
    items, labeled = db.execute(
        "SELECT count(*), coalesce(sum(open = 0), 0) FROM label_items "
        "WHERE project_id = ? AND gold IS NULL",
        (project.id,),
    ).fetchone()
    return Quality(
        annotators=[_annotator(who, rows, skipped=skipped.get(who["id"], 0)) for who in annotators],
        alpha=krippendorff_alpha(units.values()),
        agreement=agreement(units.values()),
        items=items,
        labeled=labeled,
        labels=sum(map(len, units.values())),
        wins=_wins(rows),
        pairs=_pairs(annotators, rows),
    )


def _annotator(who: sqlite3.Row, rows: Sequence[sqlite3.Row], *, skipped: int) -> AnnotatorQuality:
    mine = [row for row in rows if row["annotator_id"] == who["id"]]
    decided = [row["choice"] == "left" for row in mine if row["choice"] in ("left", "right")]
    first = {row["item_id"]: canonical(row) for row in mine if row["purpose"] == "label"}
    again = [row for row in mine if row["purpose"] == "repeat" and row["item_id"] in first]
    same = [canonical(row) == first[row["item_id"]] for row in again]
    known = [canonical(row) == row["gold"] for row in mine if row["purpose"] == "gold"]
    return AnnotatorQuality(
        pseudonym=pseudonym(who["number"]),
        name=who["name"],
        labels=len(mine),
        skipped=skipped,
        seconds=statistics.median(row["seconds"] for row in mine) if mine else None,
        left=Rate(sum(decided), len(decided)),
        repeats=Rate(sum(same), len(same)),
        gold=Rate(sum(known), len(known)),
    )


def _pairs(annotators: Sequence[sqlite3.Row], rows: Sequence[sqlite3.Row]) -> list[PairQuality]:
    answers: defaultdict[int, dict[int, str]] = defaultdict(dict)
    for row in rows:
        if row["purpose"] == "label":
            answers[row["annotator_id"]][row["item_id"]] = canonical(row)
    found = []
    for one, other in combinations(annotators, 2):
        mine, theirs = answers[one["id"]], answers[other["id"]]
        both = [(mine[item], theirs[item]) for item in mine.keys() & theirs.keys()]
        if both:
            rate = Rate(sum(a == b for a, b in both), len(both))
            names = pseudonym(one["number"]), pseudonym(other["number"])
            found.append(PairQuality(*names, rate, cohen_kappa(both)))
    return found


def pseudonym(number: int) -> str:
    """Return the name under which an annotator's labels are exported."""
    return f"annotator-{number}"


def _wins(rows: Sequence[sqlite3.Row]) -> dict[tuple[str, str], Rate]:
    """Return how often each model won against the other model of its pairs."""
    won: Counter[tuple[str, str]] = Counter()
    for row in rows:
        models, answer = json.loads(row["models"]), canonical(row)
        if row["purpose"] == "label" and len(set(models)) == 2 and answer in ("a", "b"):
            won[tuple(models if answer == "a" else models[::-1])] += 1
    pairs = sorted({tuple(sorted(pair)) for pair in won})
    return {(a, b): Rate(won[a, b], won[a, b] + won[b, a]) for a, b in pairs}
