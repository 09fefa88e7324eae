"""Compare runs: their numbers, their curves, and what differs between their recipes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from align.report.curves import chart_controls, charts_of, picture_of
from align.report.markup import Markup, even, join, number, table, tag
from align.report.read import RunRecord, own_models
from align.report.series import Chart

MAX_PANELS = 12

Named = Mapping[str, RunRecord]
"""Runs by the name that tells them apart."""
SHOWN_KEYS = 20
"""Keys of differing recipes that are shown unfolded."""


def named_runs(runs: Sequence[RunRecord]) -> Named:
    """Return the runs by folder name, or by path where two folders have the same name."""
    names = [run.directory.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.directory) for run in runs]
    named: dict[str, RunRecord] = {}
    for name, run in zip(names, runs, strict=True):
        # The same folder may be given twice.
        copies = sum(known.directory == run.directory for known in named.values())
        named[f"{name} ({copies + 1})" if copies else name] = run
    return named


def comparison_page(runs: Named) -> list[Markup | None]:
    """Return the sections of a page that compares runs; the first is the baseline."""
    first, *others = runs
    intro = (
        f"{', '.join(others)} compared with {first}. The interval of a difference assumes "
        "independent runs: half-widths are added in quadrature. It is wider than a paired "
        "interval. For a paired comparison, evaluate both checkpoints in one stage."
    )
    return [
        tag("section", tag("h2", f"{len(runs)} runs"), tag("p", intro)),
        _numbers(runs),
        _recipes(runs),
        _curves(runs),
    ]


def _numbers(runs: Named) -> Markup | None:
    rows: list[list[object]] = []
    first, *others = runs
    models = {name: own_models(run.summary) for name, run in runs.items()}
    for model in [m for m in models[first] if all(m in found for found in models.values())]:
        for metric in models[first][model]:
            triples = [found[model].get(metric) for found in models.values()]
            if all(t is not None and t[0] is not None for t in triples):
                gaps = [_difference(triples[0], other) for other in triples[1:]]
                rows.append([f"{model} {metric}", *map(_cell, triples), *map(_cell, gaps)])
    if not rows:
        return tag("p", "The runs have no evaluated model in common.", class_="note")
    heads: list[object] = ["", *runs, *(f"{other} - {first}" for other in others)]
    return tag("section", tag("h2", "Numbers"), table(heads, rows, class_="numbers"))


def _difference(a: list[Any], b: list[Any]) -> list[Any]:
    value = b[0] - a[0]
    if None in (*a, *b):
        return [value, None, None]
    # Lower end: b at its lower bound while a is at its upper one, combined in quadrature.
    low = math.hypot(b[0] - b[1], a[2] - a[0])
    high = math.hypot(b[2] - b[0], a[0] - a[1])
    return [value, value - low, value + high]


def _cell(triple: list[Any]) -> Markup:
    value, low, high = triple
    spread = None if low is None or low == high else tag("small", f"[{even(low)}, {even(high)}]")
    return tag("div", even(value), spread, class_="triple")


def _recipes(runs: Named) -> Markup:
    found = [_flat(run.recipe.model_dump(mode="json")) for run in runs.values()]
    rows: list[list[object]] = [
        [key, *values]
        for key in dict.fromkeys(key for flat in found for key in flat)
        if len(set(values := [str(flat.get(key, "-")) for flat in found])) > 1
    ]
    body = table(["key", *runs], rows) if rows else tag("p", "The recipes are identical.")
    if len(rows) > SHOWN_KEYS:  # recipes of two kinds, whose curves should not be far below
        body = tag("details", tag("summary", "All of them"), body)
    title = (
        "Recipes: 1 key differs" if len(rows) == 1 else f"Recipes: {number(len(rows))} keys differ"
    )
    return tag("section", tag("h2", title), body)


def _flat(value: object, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        found: dict[str, Any] = {}
        for name, item in items:
            found |= _flat(item, f"{key}.{name}" if key else str(name))
        return found
    return {key: value}


def shared_charts(runs: Named) -> list[Chart]:
    """Return the first panels of every stage that at least two runs have, one line per run.

    Of a panel with several lines, the first of each run is drawn.
    """
    found: dict[str, dict[str, Chart]] = {}
    for name, run in runs.items():
        for chart in charts_of(run):
            found.setdefault(chart.id, {})[name] = chart
    shared = []
    for parts in found.values():
        if len(parts) > 1:
            chart = next(iter(parts.values()))
            lines = [replace(part.lines[0], label=name) for name, part in parts.items()]
            # What is one number in all runs is in their recipes, or not worth a chart.
            if len({y for line in lines for y in line.y if y is not None}) > 1:
                shared.append(Chart(chart.group, chart.title, lines))
    groups = dict.fromkeys(chart.group for chart in shared)
    return [c for g in groups for c in [c for c in shared if c.group == g][:MAX_PANELS]]


def _curves(runs: Named) -> Markup | None:
    charts = shared_charts(runs)
    blocks = [
        join(
            tag("h3", group),
            tag("div", *(picture_of(c) for c in charts if c.group == group), class_="charts"),
        )
        for group in dict.fromkeys(chart.group for chart in charts)
    ]
    return tag("section", tag("h2", "Curves"), chart_controls(), *blocks) if blocks else None
