"""From scored answers to the blocks of summary.json: intervals, win rates, differences, bands.

Pure functions on plain records. An answer that could not be scored (None) is counted and left
out; in a comparison it leaves with its partner.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from align.evaluation.stats import Interval, WinRate, paired_bootstrap, share_interval, win_rate

Triple = list[float | None]
"""[value, low, high]; None where there is nothing to estimate from."""


class Record(TypedDict):
    """Hold one answer of one model and what was measured of it.

    ``scores`` and ``judge`` are None where invalid; ``length`` is in tokens; ``kl`` is in nats
    per answer; ``repeats`` is the share of word trigrams that stood in the answer before;
    ``finish_reason`` is ``"stop"`` or ``"length"``; ``group`` is what results are broken down by.
    """

    prompt_index: int
    sample_index: int
    prompt: Any
    completion: Any
    scores: dict[str, float | None]
    judge: float | None
    length: int
    repeats: float
    kl: float | None
    finish_reason: str
    group: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Hold how model a compares with model b on the same prompts.

    Attributes:
        win_rate: by the judge, ties half; None where no pair could be judged.
        num_invalid: pairs left out of the win rate.
        differences: metric to the interval of the mean of a - b.
    """

    win_rate: WinRate | None
    num_invalid: int
    differences: dict[str, Triple]


def as_triple(interval: Interval | WinRate | None) -> Triple:
    """Give [value, low, high]; None for an absent interval and for bounds that are not numbers."""
    if interval is None:
        return [None, None, None]
    values = (interval.value, interval.low, interval.high)
    return [value if math.isfinite(value) else None for value in values]


def valid_pairs(
    a: Sequence[float | None], b: Sequence[float | None], clusters: Sequence[Any]
) -> tuple[list[float], list[float], list[Any]]:
    """Keep the rows in which both sides have a score.

    Raises:
        ValueError: if the lengths differ.
    """
    rows = [
        (x, y, cluster)
        for x, y, cluster in zip(a, b, clusters, strict=True)
        if x is not None and y is not None
    ]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


UNBOUNDED = ("kl", "length")
"""Metrics that are no shares, whatever their values."""


def mean_interval(
    scores: Sequence[float | None], clusters: Sequence[Any], *, seed: int = 0, share: bool = True
) -> Interval | None:
    """Give the mean of the valid scores with its 95 % interval; None where there is none.

    Scores that all lie in [0, 1] are shares and have a `share_interval`; others, and all with
    ``share=False``, are bootstrapped.
    """
    kept, _, names = valid_pairs(scores, scores, clusters)
    if not kept:
        return None
    if share and _are_shares(kept):
        return share_interval(kept, clusters=names)
    return paired_bootstrap(kept, clusters=names, seed=seed)


def difference_interval(
    a: Sequence[float | None],
    b: Sequence[float | None],
    clusters: Sequence[Any],
    *,
    seed: int = 0,
    share: bool = True,
) -> Interval | None:
    """Give the mean of a - b over valid pairs with its 95 % interval, as `mean_interval` does."""
    kept_a, kept_b, names = valid_pairs(a, b, clusters)
    if not kept_a:
        return None
    if share and _are_shares(kept_a) and _are_shares(kept_b):
        moved = [x - y for x, y in zip(kept_a, kept_b, strict=True)]
        return share_interval(moved, bounds=(-1.0, 1.0), clusters=names)
    return paired_bootstrap(kept_a, kept_b, clusters=names, seed=seed)


def _are_shares(values: Sequence[float]) -> bool:
    return min(values) >= 0.0 and max(values) <= 1.0


def columns_of(records: Sequence[Record]) -> dict[str, Callable[[Record], float | None]]:
    """Name the metrics of the records: the scores, judge, kl where measured, length, stop_rate."""

    def of_score(name: str) -> Callable[[Record], float | None]:
        return lambda record: record["scores"][name]

    names = list(records[0]["scores"])
    for record in records:
        if list(record["scores"]) != names:
            raise ValueError(
                f"prompt {record['prompt_index']}: scores {list(record['scores'])}, but the first "
                f"record has {names}; every answer needs the same scores"
            )
    columns = {name: of_score(name) for name in names}
    taken = {"judge", "kl", "length", "repeats", "stop_rate"} & set(names)
    if taken:
        raise ValueError(f"score names {sorted(taken)} are taken; give them another 'name'")
    columns["judge"] = lambda record: record["judge"]
    if any(record["kl"] is not None for record in records):
        columns["kl"] = lambda record: record["kl"]
    columns["length"] = lambda record: float(record["length"])
    columns["repeats"] = lambda record: record["repeats"]
    columns["stop_rate"] = lambda record: float(record["finish_reason"] == "stop")
    return columns


def summarise_model(records: Sequence[Record], *, seed: int = 0) -> dict[str, Triple]:
    """Summarise the answers of one model.

    Args:
        records: at least one; samples of one prompt share ``prompt_index`` and count as one
            cluster in the intervals.
        seed: of the bootstrap.

    Returns:
        Metric to [value, low, high]; where answers had to be left out also ``<metric>_invalid``,
        their number (a count has no spread: three times the same).

    Raises:
        ValueError: if there is no record or the records' scores differ in name.
    """
    if not records:
        raise ValueError("no answers to summarise; the evaluation has no prompts")
    clusters = [record["prompt_index"] for record in records]
    block: dict[str, Triple] = {}
    for name, of in columns_of(records).items():
        values = [of(record) for record in records]
        share = name not in UNBOUNDED
        block[name] = as_triple(mean_interval(values, clusters, seed=seed, share=share))
        if num_invalid := float(sum(value is None for value in values)):
            block[f"{name}_invalid"] = [num_invalid] * 3
    return block


def by_place(records: Sequence[Record]) -> dict[tuple[int, int], Record]:
    """Index records by (prompt_index, sample_index), which must be unique."""
    places = {(record["prompt_index"], record["sample_index"]): record for record in records}
    if len(places) != len(records):
        raise ValueError(
            f"{len(records)} answers at {len(places)} places; (prompt_index, sample_index) must "
            "be unique within a model"
        )
    return places


def compare(
    records_a: Sequence[Record], records_b: Sequence[Record], *, seed: int = 0
) -> Comparison:
    """Compare two models' answers to the same prompts, pair by pair.

    Args:
        records_a: answers of the model in question.
        records_b: answers of the baseline: the same (prompt_index, sample_index) in any order.
        seed: of the bootstrap.

    Raises:
        ValueError: if the two sides do not answer the same prompts.
    """
    places_a, places_b = by_place(records_a), by_place(records_b)
    alone = places_a.keys() ^ places_b.keys()
    if alone or not places_a:
        raise ValueError(
            f"{len(alone)} of {len(places_a.keys() | places_b.keys())} (prompt, sample) places "
            "are answered by one model only; compare models on the same prompts"
        )
    places = sorted(places_a)
    clusters = [prompt for prompt, _ in places]
    columns_b = columns_of(records_b)
    values = {
        name: ([of(places_a[place]) for place in places], [of(places_b[place]) for place in places])
        for name, of in columns_of(records_a).items()
        if name in columns_b
    }
    judged_a, judged_b, names = valid_pairs(*values["judge"], clusters)
    return Comparison(
        win_rate=win_rate(judged_a, judged_b, clusters=names) if judged_a else None,
        num_invalid=len(places) - len(judged_a),
        differences={
            name: as_triple(
                difference_interval(a, b, clusters, seed=seed, share=name not in UNBOUNDED)
            )
            for name, (a, b) in values.items()
        },
    )


def differences(
    models: Mapping[str, Sequence[Record]], *, baseline: str, seed: int = 0
) -> dict[str, Triple]:
    """Give ``"<model>-<baseline>/<metric>"`` -> [value, low, high] for every other model."""
    return {
        f"{name}-{baseline}/{metric}": triple
        for name, records in models.items()
        if name != baseline
        for metric, triple in compare(records, models[baseline], seed=seed).differences.items()
    }


def build_summary(
    models: Mapping[str, Sequence[Record]], *, baseline: str, seed: int = 0
) -> dict[str, Any]:
    """Give the blocks ``models``, ``differences`` and ``comparisons`` of summary.json.

    The baseline's win rate against itself is 0.5 without uncertainty. ``comparisons`` holds the
    judge's wins, ties, losses and the pairs left out as invalid.

    Raises:
        ValueError: if the baseline is not among the models or they answer different prompts.
    """
    if baseline not in models:
        raise ValueError(f"baseline '{baseline}' is not among the models {list(models)}")
    blocks: dict[str, dict[str, Triple]] = {}
    deltas: dict[str, Triple] = {}
    counts: dict[str, dict[str, int]] = {}
    for name, records in models.items():
        blocks[name] = summarise_model(records, seed=seed)
        if name == baseline:
            blocks[name][f"win_rate_vs_{baseline}"] = [0.5, 0.5, 0.5]
            continue
        result = compare(records, models[baseline], seed=seed)
        won = result.win_rate
        blocks[name][f"win_rate_vs_{baseline}"] = as_triple(won)
        pair = f"{name}-{baseline}"
        deltas.update({f"{pair}/{key}": value for key, value in result.differences.items()})
        wins, ties, losses = (won.wins, won.ties, won.losses) if won else (0, 0, 0)
        counts[pair] = {
            "wins": wins,
            "ties": ties,
            "losses": losses,
            "invalid": result.num_invalid,
        }
    return {"models": blocks, "differences": deltas, "comparisons": counts}


def _look_up(summary: Mapping[str, Any], key: str) -> Any:
    """Follow a key of slashes through nested dicts; a dict's own key may hold slashes too."""
    if key in summary:
        return summary[key]
    if key.endswith("_invalid") and key.removesuffix("_invalid") in summary:
        return 0.0  # counted, and none was: the block leaves zeros out
    head, _, rest = key.partition("/")
    if not rest or not isinstance(summary.get(head), Mapping):
        raise KeyError(key)
    return _look_up(summary[head], rest)


def check_expectations(
    summary: Mapping[str, Any],
    expect: Mapping[str, Sequence[float | None]],
) -> list[dict[str, Any]]:
    """Say which of a recipe's bands the summary keeps to.

    Args:
        summary: what summary.json holds.
        expect: key (``models/dpo/kl``; the end of an interval as ``models/dpo/kl:low`` or
            ``:high``) to (lowest, highest) allowed value, None for no bound.

    Returns:
        One entry a key: ``key``, ``band``, ``value``, ``holds``; a key that leads to no number
        has value None, holds not, and says why under ``problem``.
    """
    checks = []
    for key, (low, high) in expect.items():
        path, _, end = key.partition(":")
        check: dict[str, Any] = {"key": key, "band": [low, high], "value": None, "holds": False}
        checks.append(check)
        try:
            found = _look_up(summary, path)
        except KeyError as error:
            check["problem"] = f"the summary has no {error.args[0]!r}"
            continue
        if end not in ("", "low", "high") or (end and not isinstance(found, list)):
            check["problem"] = f"'{end}' is not an end of an interval; use ':low' or ':high'"
            continue
        value = found[["", "low", "high"].index(end)] if isinstance(found, list) else found
        if isinstance(value, bool) or not isinstance(value, int | float):
            check["problem"] = f"found {value!r} instead of a number"
            continue
        above = low is None or value >= low
        check.update(value=value, holds=above and (high is None or value <= high))
    return checks
