"""Metrics as data series: what the charts of the report and of the live pages are drawn from.

A payload has one JSON shape for both::

    {"axes": [{"step": [...], "time_s": [...], "tokens": [...]}],
     "charts": [{"id", "group", "title", "unit", "meaning", "band", "note",
                 "lines": [{"label", "name", "axis", "y", "low", "high"}]}]}

``axis`` is an index into ``axes``, which lines that were logged at the same steps share. A ``y`` of
null is a gap. charts.js reads it; a page without JavaScript shows static pictures instead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from align.core.metrics import described
from align.report.read import Row

FIXED = frozenset({"step", "time_s", "total_steps"})
CHANGE = "change/"
TOKENS = ("tokens/sampled", "tokens/trained")
"""Metrics that count the tokens of one step; their sum is an axis."""
TOGETHER = {"reward/std": "reward/mean"}
"""Metrics that are drawn in the panel of another one, which has the same unit."""
MAX_POINTS = 1500
BUDGET = 80_000
"""Points of all lines of a page together, so that the page stays below 3 MB."""
MIN_POINTS = 60

Y = list[float | None]
Interval = tuple[float | None, float | None, float | None]
Axis = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes:
        label: name in the legend.
        name: the metric.
        axis: name of the x axis to its values, all as long as ``y``: step, and where logged time_s
            and tokens.
        y: values; None leaves a gap.
        low: lower bounds of the values' intervals; empty if none was logged.
        high: upper bounds.
    """

    label: str
    name: str
    axis: Axis
    y: Y
    low: Y
    high: Y

    @property
    def points(self) -> list[tuple[float, float | None]]:
        """Return (step, value) of every point."""
        return list(zip(self.axis["step"], self.y, strict=True))

    @property
    def constant(self) -> bool:
        """Return whether all values that are finite are equal."""
        return len({y for y in self.y if y is not None}) <= 1


def panels_of(
    rows: Sequence[Row], intervals: Mapping[str, Mapping[float, Interval]] | None = None
) -> dict[str, list[Line]]:
    """Return the lines of metrics.jsonl by panel; train/x and eval/x share the panel x.

    Args:
        rows: lines of the file; one without a step is skipped.
        intervals: metric to step to (value, low, high), where an interval was logged.
    """
    rows = [row for row in rows if _finite(row.get("step")) is not None]
    x = _axis(rows)
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        for name, value in row.items():
            # Changes are in a table of their own.
            known = name in FIXED or name.startswith(CHANGE)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not known and (value is None or number):
                places.setdefault(name, []).append(i)
    panels: dict[str, list[Line]] = {}
    for name, at in places.items():
        group, _, last = name.partition("/")
        shared = group in ("train", "eval") and last
        title = TOGETHER.get(name, last if shared else name)
        axis = {key: [values[i] for i in at] for key, values in x.items()}
        bounds = [(intervals or {}).get(name, {}).get(rows[i]["step"]) for i in at]
        found = any(bound and bound[1] is not None for bound in bounds)
        low, high = ([b[k] if b else None for b in bounds] if found else [] for k in (1, 2))
        y = [_finite(rows[i][name]) for i in at]
        line = Line(group if shared else name, name, axis, y, low, high)
        panels.setdefault(title, []).append(line)
    # A panel begins with the metric that it is named after, whichever was logged first.
    return {t: sorted(lines, key=lambda line: line.name in TOGETHER) for t, lines in panels.items()}


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _axis(rows: Sequence[Row]) -> Axis:
    """Return the x values of every row by axis; an axis that not all rows can have is left out."""
    axis: Axis = {"step": [row["step"] for row in rows]}
    times = [_finite(row.get("time_s")) for row in rows]
    if rows and None not in times:
        axis["time_s"] = [t for t in times if t is not None]
    if any(_finite(row.get(name)) is not None for row in rows for name in TOKENS):
        total, axis["tokens"] = 0.0, []
        for row in rows:
            total += sum(_finite(row.get(name)) or 0.0 for name in TOKENS)
            axis["tokens"].append(total)
    return axis


def intervals_of(evaluations: Sequence[Row]) -> dict[str, dict[float, Interval]]:
    """Return the intervals of evaluations during training as metric -> step -> interval."""
    found: dict[str, dict[float, Interval]] = {}
    for row in evaluations:
        bounds = row.get("intervals")
        for name, triple in bounds.items() if isinstance(bounds, dict) else ():
            if (
                isinstance(triple, list)
                and len(triple) == 3
                and _finite(row.get("step")) is not None
            ):
                middle, low, high = map(_finite, triple)
                found.setdefault(f"eval/{name}", {})[row["step"]] = (middle, low, high)
    return found


def thin(line: Line, limit: int) -> tuple[Line, int]:
    """Return the line with at most ``limit`` points, each the mean of a run, and the runs' length.

    The bounds of a run are its lowest and its highest one.
    """
    run = max(1, math.ceil(len(line.y) / limit))
    if run == 1:
        return line, 1
    parts = [slice(i, i + run) for i in range(0, len(line.y), run)]
    known = [[y for y in line.y[part] if y is not None] for part in parts]
    axis = {key: [values[part][-1] for part in parts] for key, values in line.axis.items()}
    y: Y = [sum(part) / len(part) if part else None for part in known]
    lows = [[v for v in line.low[part] if v is not None] for part in parts]
    highs = [[v for v in line.high[part] if v is not None] for part in parts]
    low: Y = [min(part) if part else None for part in lows] if line.low else []
    high: Y = [max(part) if part else None for part in highs] if line.high else []
    return replace(line, axis=axis, y=y, low=low, high=high), run


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of one panel.

    Attributes:
        group: the stage, or whatever else the chart belongs to.
        title: the panel.
        lines: its lines.
        band: range that the recipe expects.
    """

    group: str
    title: str
    lines: Sequence[Line]
    band: tuple[float | None, float | None] | None = None

    @property
    def id(self) -> str:
        """Return what tells the chart from all others of a page."""
        return f"{self.group}/{self.title}"


def payload(charts: Sequence[Chart]) -> dict[str, object]:
    """Return the charts as one JSON value, thinned so that a page of them stays small."""
    num_lines = sum(len(chart.lines) for chart in charts)
    limit = min(MAX_POINTS, max(MIN_POINTS, BUDGET // max(1, num_lines)))
    axes: list[dict[str, list[float]]] = []
    places: dict[tuple[tuple[str, tuple[float, ...]], ...], int] = {}
    found = []
    for chart in charts:
        lines, longest = [], 1
        for whole in chart.lines:
            line, run = thin(whole, limit)
            longest = max(longest, run)
            key = tuple((name, tuple(values)) for name, values in line.axis.items())
            if key not in places:
                places[key] = len(axes)
                axes.append({name: _short(values) for name, values in line.axis.items()})
            shown = {"label": line.label, "name": line.name, "axis": places[key]}
            numbers = {"y": line.y, "low": line.low, "high": line.high}
            lines.append(shown | {k: [*map(_rounded, v)] for k, v in numbers.items() if v})
        metric = described(chart.title)
        found.append(
            {
                "id": chart.id,
                "group": chart.group,
                "title": chart.title,
                "unit": metric.unit if metric is not None else "",
                "meaning": metric.meaning if metric is not None else "",
                "band": chart.band,
                "note": f"each point the mean of {longest}" if longest > 1 else "",
                "lines": lines,
            }
        )
    return {"axes": axes, "charts": found}


def _rounded(value: float | None) -> float | None:
    """Return a value with six significant digits, which no chart can show more of."""
    return None if value is None else float(f"{value:.6g}")


def _short(values: Sequence[float]) -> list[float]:
    return [int(x) if x == int(x) else round(x, 3) for x in values]
