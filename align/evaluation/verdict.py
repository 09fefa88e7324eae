"""One task's block of summary.json: each checkpoint's metrics, and its verdict on each of them.

A metric with a preferred direction has a verdict: ``better`` or ``worse`` than the baseline if the
95 % interval of the difference excludes "no difference", else ``no significant difference``.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.core.types import NO_DIFFERENCE
from align.evaluation.compare import (
    UNBOUNDED,
    Record,
    Triple,
    as_triple,
    by_place,
    clusters_of,
    columns_of,
    difference_interval,
    mean_interval,
    valid_pairs,
)
from align.evaluation.length import length_controlled_win_rate
from align.evaluation.passk import pass_by_prompt
from align.evaluation.stats import (
    Interval,
    prompts_needed,
    ratio_bootstrap,
    smallest_difference,
    standard_error,
    win_rate_of,
)

WIN_RATES = ("win_rate", "length_controlled_win_rate")
LOWER_IS_BETTER = ("repeats", "perplexity")
Place = tuple[int, int]
"""(prompt_index, sample_index)."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A model's judged pairs against the baseline.

    Attributes:
        results: place to 1 (win) .. 0 (loss), the mean over both orders; None is invalid.
        sequence: the interval of a sequential judge, valid at any stopping time; None if the
            judge was not sequential.
    """

    results: Mapping[Place, float | None]
    sequence: Interval | None = None


@dataclass(frozen=True, slots=True)
class RowLoss:
    """A model's loss on one held-out response: total nats and number of tokens.

    Rows with the same prompt have the same ``cluster``; with None each row is one.
    """

    nats: float
    tokens: int
    cluster: Hashable = None


@dataclass(frozen=True, slots=True)
class Responses:
    """One model's responses to a task and its losses on the held-out responses."""

    records: Sequence[Record]
    losses: Sequence[RowLoss] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """The measurement of one metric: its value, and its difference to the baseline.

    Attributes:
        value: the model's value; for a win rate, the comparison itself.
        difference: difference to the baseline, None for the baseline itself; for perplexity in
            nats per token.
        null: the value that means "no difference": 0, or 1/2 for a win rate.
        error: standard error of the difference.
        prompts: number of prompts that the difference was measured on.
    """

    value: Interval | None
    difference: Interval | None = None
    null: float = 0.0
    error: float = math.nan
    prompts: int = 0


def task_block(
    models: Mapping[str, Responses],
    *,
    baseline: str,
    metrics: Sequence[str],
    judged: Mapping[str, Judged],
    seed: int = 0,
) -> dict[str, Any]:
    """Return the block of one task in summary.json.

    Args:
        models: each model's responses to the same prompts, including the baseline's.
        baseline: the model that the others are compared with.
        metrics: metrics to report, the deciding one first.
        judged: each other model's judged pairs against the baseline.
        seed: random seed of the bootstrap.

    Returns:
        ``models`` (model to metric to [value, low, high]), ``contrasts`` (other model to metric to
        difference, verdict and prompts needed), ``groups`` (group to model to the first graded
        metric, if records have groups), ``comparisons`` (the judge's counts), ``invalid`` (model
        to metric to the number of excluded responses, if any).
    """
    others = [name for name in models if name != baseline]
    findings: dict[str, dict[str, Finding]] = {}
    for name, model in models.items():
        other = None if name == baseline else models[baseline]
        pairs = judged.get(name)
        findings[name] = {m: find(m, model, other, judged=pairs, seed=seed) for m in metrics}
    # Lay the measurements out as plain JSON data.
    first = models[baseline].records
    block: dict[str, Any] = {
        "baseline": baseline,
        "metrics": list(metrics),
        "prompts": len({r["prompt_index"] for r in first}),
        "samples": 1 + max(r["sample_index"] for r in first),
        "models": {
            name: {m: as_triple(found.value) for m, found in row.items()}
            for name, row in findings.items()
        },
        "contrasts": {
            name: {m: told(m, found) for m, found in findings[name].items()} for name in others
        },
        "comparisons": {name: _counts(pairs) for name, pairs in judged.items()},
    }
    if invalid := {name: found for name in models if (found := _invalid(models[name], metrics))}:
        block["invalid"] = invalid
    if groups := _groups(models, metrics):
        block["groups"] = groups
    return block


def find(
    metric: str, model: Responses, other: Responses | None, *, judged: Judged | None, seed: int
) -> Finding:
    """Return the measurement of one metric of a model, and its difference to ``other`` if given."""
    if metric in WIN_RATES:
        return Finding(None) if judged is None else _won(metric, model, other, judged=judged)
    if metric == "perplexity":
        return _perplexity(model, other, seed=seed)
    mine = _units(metric, model.records)
    share = metric not in UNBOUNDED
    same = clusters_of(model.records)
    prompts = [same[unit[0]] for unit in mine]
    value = mean_interval(list(mine.values()), prompts, seed=seed, share=share)
    if other is None:
        return Finding(value)
    # Pair the units that both models have and that are valid on both sides.
    theirs = _units(metric, other.records)
    shared = [unit for unit in mine if unit in theirs]
    sides = [mine[u] for u in shared], [theirs[u] for u in shared]
    clusters = [same[unit[0]] for unit in shared]
    a, b, names = valid_pairs(*sides, clusters)
    if not a:
        return Finding(value)
    return Finding(
        value,
        difference_interval(a, b, names, seed=seed, share=share),
        error=standard_error(a, b, clusters=names),
        prompts=len(set(names)),
    )


def _units(metric: str, records: Sequence[Record]) -> dict[Place, float | None]:
    """Return a metric's values by response, or those of pass@k by prompt."""
    if metric.startswith("pass@"):
        # The grader's first score decides what is correct.
        first = next(iter(records[0]["scores"]))
        scores = [r["scores"][first] for r in records]
        prompts = [r["prompt_index"] for r in records]
        passes = pass_by_prompt(scores, prompts, k=int(metric.removeprefix("pass@")))
        return {(prompt, 0): value for prompt, value in passes.items()}
    of = columns_of(records).get(metric)
    return {} if of is None else {place: of(r) for place, r in by_place(records).items()}


def _perplexity(model: Responses, other: Responses | None, *, seed: int) -> Finding:
    clusters = [i if row.cluster is None else row.cluster for i, row in enumerate(model.losses)]
    tokens = _sums([float(row.tokens) for row in model.losses], clusters)
    loss = ratio_bootstrap(_sums([row.nats for row in model.losses], clusters), tokens, seed=seed)
    value = Interval(*(math.exp(x) for x in (loss.value, loss.low, loss.high)))
    if other is None:
        return Finding(value)
    # The difference is in nats per token: perplexities are not additive.
    pairs = zip(model.losses, other.losses, strict=True)
    moved = _sums([a.nats - b.nats for a, b in pairs], clusters)
    difference = ratio_bootstrap(moved, tokens, seed=seed)
    # Linearized: the error of a ratio is that of the mean residual, divided by the mean count.
    mean = sum(tokens) / len(tokens)
    error = standard_error(
        [(m - difference.value * t) / mean for m, t in zip(moved, tokens, strict=True)]
    )
    return Finding(value, difference, error=error, prompts=len(moved))


def _sums(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float]:
    """Return the sum of each cluster, in order of first appearance."""
    found: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        found[cluster] = found.get(cluster, 0.0) + value
    return list(found.values())


def _won(metric: str, model: Responses, other: Responses | None, *, judged: Judged) -> Finding:
    known = {place: x for place, x in judged.results.items() if x is not None}
    if not known or other is None:
        return Finding(None)
    same = clusters_of(model.records)
    results, clusters = list(known.values()), [same[place[0]] for place in known]
    if metric == "win_rate":
        won = win_rate_of(results, clusters=clusters)
        interval = judged.sequence or Interval(won.value, won.low, won.high)
    else:
        mine, theirs = by_place(model.records), by_place(other.records)
        longer = [mine[place]["length"] - theirs[place]["length"] for place in known]
        interval = length_controlled_win_rate(results, longer, clusters=clusters)
        if interval is not None and judged.sequence is not None:
            # A fixed-size interval is not valid after early stopping: report the value alone.
            interval = Interval(interval.value, math.nan, math.nan)
    error = standard_error(results, clusters=clusters)
    return Finding(interval, interval, null=0.5, error=error, prompts=len(set(clusters)))


def told(metric: str, found: Finding) -> dict[str, Any]:
    """Return a difference with its verdict and statistical power, as in summary.json.

    ``needed`` is the number of prompts that detect a difference of the measured size with 80 %
    power; ``detectable`` is the minimum detectable effect of the measured prompts at that power.
    """
    difference = found.difference
    entry: dict[str, Any] = {"difference": as_triple(difference), "null": found.null}
    # Length and KL have no preferred direction, so they have no verdict.
    if metric not in UNBOUNDED:
        entry["verdict"] = verdict(
            difference, null=found.null, lower_is_better=metric in LOWER_IS_BETTER
        )
    if difference is not None and math.isfinite(found.error):
        entry["prompts"] = found.prompts
        entry["detectable"] = smallest_difference(standard_error=found.error)
        entry["needed"] = prompts_needed(
            difference.value - found.null, standard_error=found.error, num_prompts=found.prompts
        )
    return entry


def verdict(interval: Interval | None, *, null: float = 0.0, lower_is_better: bool = False) -> str:
    """Return the verdict of an interval against ``null``: better, worse or ``NO_DIFFERENCE``."""
    # The comparison is also false for NaN bounds.
    if interval is None or not interval.low <= interval.high:
        return NO_DIFFERENCE
    above, below = interval.low > null, interval.high < null
    if not above and not below:
        return NO_DIFFERENCE
    return "better" if above != lower_is_better else "worse"


def _counts(pairs: Judged) -> dict[str, int | bool]:
    known = [x for x in pairs.results.values() if x is not None]
    return {
        "wins": sum(x > 0.5 for x in known),
        "ties": sum(x == 0.5 for x in known),
        "losses": sum(x < 0.5 for x in known),
        "invalid": len(pairs.results) - len(known),
        "sequential": pairs.sequence is not None,
    }


def _invalid(model: Responses, metrics: Sequence[str]) -> dict[str, int]:
    """Return the number of responses that each metric excludes because they have no score."""
    columns = columns_of(model.records)
    counts = {
        name: sum(columns[name](record) is None for record in model.records)
        for name in (*metrics, "judge")
        if name in columns
    }
    return {name: count for name, count in counts.items() if count}


def _groups(models: Mapping[str, Responses], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the first graded metric by the records' group and by model."""
    records = next(iter(models.values())).records
    graded = next((m for m in metrics if m in records[0]["scores"]), None)
    names = sorted({r["group"] for r in records if r["group"] is not None})
    if graded is None:
        return {}

    def of(answered: Responses, group: str) -> Triple:
        mine = [r for r in answered.records if r["group"] == group]
        scores = [r["scores"][graded] for r in mine]
        same = clusters_of(mine)
        return as_triple(mean_interval(scores, [same[r["prompt_index"]] for r in mine]))

    return {group: {name: of(model, group) for name, model in models.items()} for group in names}


def win_matrix(records: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, Triple]]:
    """Return the win rate of each row's model against each column's, by the ``judge`` scores."""
    matrix: dict[str, dict[str, Triple]] = {}
    for a, mine in records.items():
        same = clusters_of(mine)
        for b, theirs in records.items():
            if a == b:
                continue
            known = {p: x for p, x in preferences_by_score(mine, theirs).items() if x is not None}
            clusters = [same[place[0]] for place in known]
            won = win_rate_of(list(known.values()), clusters=clusters) if known else None
            matrix.setdefault(a, {})[b] = as_triple(won)
    return matrix


def preferences_by_score(
    records: Sequence[Record], others: Sequence[Record]
) -> dict[Place, float | None]:
    """Return 1, 1/2 or 0 for each pair by the ``judge`` scores; None if a score is invalid.

    Raises:
        ValueError: the two sides have responses to different prompts.
    """
    mine, theirs = by_place(records), by_place(others)
    if alone := mine.keys() ^ theirs.keys():
        raise ValueError(
            f"{len(alone)} of {len(mine.keys() | theirs.keys())} (prompt, sample) places are "
            "answered by one model only; compare models on the same prompts"
        )
    results: dict[Place, float | None] = {}
    for place in sorted(mine):
        a, b = mine[place]["judge"], theirs[place]["judge"]
        results[place] = None if a is None or b is None else (a > b) + 0.5 * (a == b)
    return results
