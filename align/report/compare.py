"""Compare two runs: their numbers, their curves, and what differs between their recipes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.report.charts import line_chart
from align.report.markup import Markup, even, join, number, table, tag
from align.report.read import Row, RunRecord, own_models, read_run
from align.report.sections import panels_of

MAX_PANELS = 12


def comparison_page(first: RunRecord, second: RunRecord) -> list[Markup | None]:
    """Return the sections of a page that compares two runs."""
    names = (_label(first, second, 0), _label(first, second, 1))
    intro = (
        f"{names[0]} compared with {names[1]}. The interval of a difference assumes independent "
        "runs: half-widths are added in quadrature. It is wider than a paired interval. For a "
        "paired comparison, evaluate both checkpoints in one stage."
    )
    return [
        tag("section", tag("h2", "Two runs"), tag("p", intro)),
        _numbers(first, second, names),
        _recipes(first, second, names),
        _curves(first, second, names),
    ]


def read_two(first: Path, second: Path) -> tuple[RunRecord, RunRecord]:
    """Return the records of two run folders."""
    return read_run(first), read_run(second)


def _label(first: RunRecord, second: RunRecord, which: int) -> str:
    # Runs of one recipe in two places have the same folder name; then only the path tells.
    runs = (first, second)
    if first.directory.name != second.directory.name:
        return runs[which].directory.name
    return str(runs[which].directory)


def _numbers(first: RunRecord, second: RunRecord, names: tuple[str, str]) -> Markup | None:
    rows: list[list[object]] = []
    ours, theirs = (own_models(run.summary) for run in (first, second))
    for model in [name for name in ours if name in theirs]:
        for metric, a in ours[model].items():
            b = theirs[model].get(metric)
            if b is not None and a[0] is not None and b[0] is not None:
                rows.append([f"{model} {metric}", _cell(a), _cell(b), _cell(_difference(a, b))])
    if not rows:
        return tag("p", "The two runs have no evaluated model in common.", class_="note")
    heads: list[object] = ["", *names, "difference (second - first)"]
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


def _recipes(first: RunRecord, second: RunRecord, names: tuple[str, str]) -> Markup:
    a, b = (_flat(run.recipe.model_dump(mode="json")) for run in (first, second))
    rows: list[list[object]] = [
        [key, str(a.get(key, "-")), str(b.get(key, "-"))]
        for key in dict.fromkeys([*a, *b])
        if a.get(key, "-") != b.get(key, "-")
    ]
    heads: list[object] = ["key", *names]
    body = table(heads, rows) if rows else tag("p", "The recipes are identical.")
    return tag("section", tag("h2", f"Recipes: {number(len(rows))} keys differ"), body)


def _flat(value: object, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        found: dict[str, Any] = {}
        for name, item in items:
            found |= _flat(item, f"{key}.{name}" if key else str(name))
        return found
    return {key: value}


def _curves(first: RunRecord, second: RunRecord, names: tuple[str, str]) -> Markup | None:
    other = {stage.name: stage for stage in second.stages}
    blocks = [
        _stage_curves(stage.metrics, other[stage.name].metrics, name=stage.name, names=names)
        for stage in first.stages
        if stage.name in other and stage.kind != "evaluate" and stage.metrics
    ]
    return tag("section", tag("h2", "Curves"), *blocks) if blocks else None


def _stage_curves(
    first: list[Row], second: list[Row], *, name: str, names: tuple[str, str]
) -> Markup:
    a, b = panels_of(first), panels_of(second)
    charts = []
    # Only panels that both runs have; of a panel with several lines, the first of each run.
    for title in [panel for panel in a if panel in b][:MAX_PANELS]:
        series = [(label, lines[title][0][1]) for label, lines in zip(names, (a, b), strict=True)]
        charts.append(line_chart(title, series))
    return join(tag("h3", name), tag("div", *charts, class_="charts"))
