"""Records of scored responses, intervals of their means and differences, and expected ranges.

Pure functions of plain records. A response that could not be scored (None) is counted and excluded;
in a comparison its partner is excluded too.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from align.core.expectations import expectation
from align.evaluation.stats import Interval, WinRate, paired_bootstrap, share_interval
from align.recipe.schema.evaluate import OWN_TASK

Triple = list[float | None]
"""[value, low, high]; None if it cannot be estimated."""


class Record(TypedDict):
    """One response of one model with its measurements.

    ``scores`` and ``judge`` are None if invalid; ``length`` is in tokens; ``kl`` is in nats per
    response; ``repeats`` is the fraction of word trigrams that already occurred in the response;
    ``finish_reason`` is ``"stop"`` or ``"length"``; results are broken down by ``group``. Rows with
    the same prompt have the same ``cluster``; without it each row is one.
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
    cluster: NotRequired[str]


def clusters_of(records: Sequence[Record]) -> dict[int, Hashable]:
    """Return the cluster of each prompt, by its index."""
    return {r["prompt_index"]: r.get("cluster", r["prompt_index"]) for r in records}


def as_triple(interval: Interval | WinRate | None) -> Triple:
    """Return [value, low, high]; None for a missing interval and for bounds that are not finite."""
    if interval is None:
        return [None, None, None]
    values = (interval.value, interval.low, interval.high)
    return [value if math.isfinite(value) else None for value in values]


def valid_pairs(
    a: Sequence[float | None], b: Sequence[float | None], clusters: Sequence[Any]
) -> tuple[list[float], list[float], list[Any]]:
    """Return both scores and the cluster of the rows in which both sides have a score.

    Raises:
        ValueError: the lengths differ.
    """
    rows = [
        (x, y, cluster)
        for x, y, cluster in zip(a, b, clusters, strict=True)
        if x is not None and y is not None
    ]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


UNBOUNDED = ("kl", "length")
"""Metrics that are never fractions, even if all their values are in [0, 1]."""


def mean_interval(
    scores: Sequence[float | None], clusters: Sequence[Any], *, seed: int = 0, share: bool = True
) -> Interval | None:
    """Return the mean of the valid scores with its 95 % interval; None without a valid score.

    Scores that are all in [0, 1] are treated as fractions (`share_interval`). Others, and all
    scores with ``share=False``, are bootstrapped.
    """
    kept, _, names = valid_pairs(scores, scores, clusters)
    if not kept:
        return None
    # A bootstrap of fractions near 0 or 1 is too narrow; the score interval is not.
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
    """Return the mean of a - b over valid pairs with its 95 % interval; see `mean_interval`."""
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
    """Return a getter for each metric of the records, by the metric's name.

    The metrics are the scores, judge, kl (if measured), length, repeats and stop_rate.

    Raises:
        ValueError: records have different scores, or a score has the name of another metric.
    """

    def of_score(name: str) -> Callable[[Record], float | None]:
        return lambda record: record["scores"][name]

    names = list(records[0]["scores"])
    for record in records:
        if list(record["scores"]) != names:
            raise ValueError(
                f"prompt {record['prompt_index']}: scores {list(record['scores'])}, but the first "
                f"record has {names}; every response needs the same scores"
            )
    columns = {name: of_score(name) for name in names}
    # Scores are columns beside those of every response, so they may not share a name.
    taken = {"judge", "kl", "length", "repeats", "stop_rate"} & set(names)
    if taken:
        raise ValueError(
            f"score {', '.join(sorted(taken))}: the name of a metric; set another 'name'"
        )
    columns["judge"] = lambda record: record["judge"]
    if any(record["kl"] is not None for record in records):
        columns["kl"] = lambda record: record["kl"]
    columns["length"] = lambda record: float(record["length"])
    columns["repeats"] = lambda record: record["repeats"]
    columns["stop_rate"] = lambda record: float(record["finish_reason"] == "stop")
    return columns


def by_place(records: Sequence[Record]) -> dict[tuple[int, int], Record]:
    """Return the records by (prompt_index, sample_index).

    Raises:
        ValueError: two records have the same indices.
    """
    places = {(record["prompt_index"], record["sample_index"]): record for record in records}
    if len(places) != len(records):
        raise ValueError(
            f"{len(records)} responses at {len(places)} places; (prompt_index, sample_index) must "
            "be unique within a model"
        )
    return places


def _look_up(summary: Mapping[str, Any], key: str) -> Any:
    """Return the number or interval that a key of ``expect`` names.

    ``models/...`` and ``differences/...`` refer to the stage's own prompts (task ``heldout``);
    every other key is a path through summary.json. A key of a mapping may contain slashes.

    Raises:
        KeyError: with the first part of the key that does not exist.
    """
    own = summary.get("tasks", {}).get(OWN_TASK, {})
    head, _, rest = key.partition("/")
    if head == "models":
        model, _, metric = rest.partition("/")
        if metric == f"win_rate_vs_{own.get('baseline')}":
            metric = "win_rate"
        if metric.endswith("_invalid") and metric.removesuffix("_invalid") in own["models"][model]:
            # Metrics without invalid responses are not listed in the summary.
            return own["invalid"].get(model, {}).get(metric.removesuffix("_invalid"), 0)
        return own.get("models", {})[model][metric]
    if head == "differences":
        pair, _, metric = rest.partition("/")
        model = pair.removesuffix(f"-{own.get('baseline')}")
        if model == pair:
            raise KeyError(pair)
        return own.get("contrasts", {})[model][metric]["difference"]
    return _walk(summary, key)


def _walk(part: Mapping[str, Any], key: str) -> Any:
    if key in part:
        return part[key]
    # Try every slash as the separator: names of files and tasks may contain slashes.
    for cut in (i for i, letter in enumerate(key) if letter == "/"):
        if isinstance(part.get(key[:cut]), Mapping):
            return _walk(part[key[:cut]], key[cut + 1 :])
    raise KeyError(key)


def check_expectations(
    summary: Mapping[str, Any],
    expect: Mapping[str, Sequence[float | None]],
) -> list[dict[str, Any]]:
    """Return whether each number is within the range that the recipe expects.

    Args:
        summary: content of summary.json.
        expect: key (``models/dpo/kl``, ``differences/grpo-sft/exact_match``; the end of an
            interval as ``models/dpo/kl:low`` or ``:high``) to the (lowest, highest) expected value;
            None for no bound.

    Returns:
        One entry of ``expectation`` per key.
    """
    return [expectation(key, band, *_measured(summary, key)) for key, band in expect.items()]


def _measured(summary: Mapping[str, Any], key: str) -> tuple[object, str]:
    """Return what a key of ``expect`` leads to, or None and why it leads nowhere."""
    # `win_rate:low` expects an end of the interval, `win_rate` its value.
    path, _, end = key.partition(":")
    try:
        found = _look_up(summary, path)
    except KeyError as error:
        return None, f"the summary has no {error.args[0]!r}"
    if end not in ("", "low", "high") or (end and not isinstance(found, list)):
        return None, f"'{end}' is not an end of an interval; use ':low' or ':high'"
    return found[["", "low", "high"].index(end)] if isinstance(found, list) else found, ""
