"""The first screen of the report: status, a forest plot, three findings, and links."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from align.core.types import NO_DIFFERENCE
from align.recipe.schema.evaluate import OWN_TASK
from align.report.charts import tick_label, ticks
from align.report.markup import Markup, even, join, number, tag
from align.report.read import RunRecord
from align.report.tables import ordered_models

Block = Mapping[str, Any]
MAX_PANELS = 3
WIDTH, NAMES, ROW, TOP, BOTTOM = 340, 90, 20, 8, 24
CLASSES = {"better": "ok", "worse": "bad"}


def overview(run: RunRecord) -> Markup:
    """Return the first screen of a run's report."""
    block = _first_block(run)
    plots = forest(run, block) if block is not None else None
    return tag("section", _status(run), plots, _findings(run, block), id="overview")


def _first_block(run: RunRecord) -> Block | None:
    """Return the block of the run's own prompts, else of its first task; None without any."""
    tasks = run.summary.get("tasks", {})
    return tasks.get(OWN_TASK) or next(iter(tasks.values()), None)


def _status(run: RunRecord) -> Markup:
    """Return the failed expectations, or that all hold, and the number of alarms."""
    found = run.summary.get("expectations", [])
    failed = [line for line in found if not line["holds"]]
    num_alarms = sum(len(stage.alarms) for stage in run.stages)
    lines = [
        tag("li", f"✗ {line['key']} is {number(line['value'])}, expected {_band(line['band'])}")
        for line in failed
    ]
    if failed:
        head = f"{len(failed)} of {len(found)} expectations failed (exit code 1)"
    elif found:
        head = f"✓ all {len(found)} expectations hold"
    else:
        expected = any(getattr(x, "expect", None) for x in run.recipe.stages.values())
        head = "expectations: not evaluated yet" if expected else "no expectations in the recipe"
    kind = "bad" if failed else "ok" if found else "quiet"
    alarms = tag("a", f"{num_alarms} alarms", href="#alarms", class_="bad") if num_alarms else None
    return join(
        tag("p", tag("b", head, class_=kind), " · " if alarms else None, alarms),
        tag("ul", *lines, class_="bad") if lines else None,
    )


def _band(band: Sequence[float | None]) -> str:
    low, high = band
    if low is None or high is None:
        return f"at most {number(high)}" if low is None else f"at least {number(low)}"
    return f"{number(low)} to {number(high)}"


def forest(run: RunRecord, block: Block) -> Markup | None:
    """Return one panel per metric with a verdict: each model's value, interval and verdict."""
    models = ordered_models(block, list(run.recipe.stages))
    judged = [
        metric
        for metric in block["metrics"]
        if metric != "length_controlled_win_rate"
        and any("verdict" in row.get(metric, {}) for row in block["contrasts"].values())
    ]
    panels = [_panel(block, metric, models) for metric in judged[:MAX_PANELS]]
    panels = [panel for panel in panels if panel is not None]
    return tag("div", *panels, class_="charts") if panels else None


def _panel(block: Block, metric: str, models: Sequence[str]) -> Markup | None:
    rows = [(name, block["models"][name].get(metric)) for name in models]
    rows = [(name, value) for name, value in rows if value and value[0] is not None]
    if not rows:
        return None
    # The line of no difference: 1/2 for a win rate, else the baseline's value.
    base = block["models"][block["baseline"]].get(metric)
    middle = 0.5 if metric.endswith("win_rate") else base[0] if base else None
    numbers = [x for _, value in rows for x in value if x is not None and isfinite(x)]
    x_ticks = ticks(min([*numbers, *_one(middle)]), max([*numbers, *_one(middle)]))
    height = TOP + ROW * len(rows) + BOTTOM

    def at(x: float) -> str:
        part = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return f"{NAMES + part * (WIDTH - NAMES - 12):.1f}"

    marks = [
        tag("text", tick_label(x, x_ticks), x=at(x), y=height - 8, class_="middle") for x in x_ticks
    ]
    if middle is not None:
        ends = {"y1": TOP, "y2": height - BOTTOM}
        marks.append(tag("line", x1=at(middle), x2=at(middle), **ends, class_="null"))
    for i, (name, value) in enumerate(rows):
        verdict = block["contrasts"].get(name, {}).get(metric, {}).get("verdict", "")
        marks.append(_estimate(name, value, TOP + ROW * (i + 0.5), at=at, verdict=verdict))
    svg = tag(
        "svg",
        *marks,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=f"{metric} of {', '.join(name for name, _ in rows)} with 95 % intervals",
    )
    title = metric.replace("_", " ")
    return tag("figure", tag("figcaption", tag("b", title)), svg, class_="forest")


def _one(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _estimate(
    name: str, value: Sequence[Any], y: float, *, at: Callable[[float], str], verdict: str
) -> Markup:
    """Return a model's name, its interval as a line and its value as a dot."""
    middle, low, high = value
    shown = f"{name}: {even(middle)}" + ("" if low is None else f" [{even(low)}, {even(high)}]")
    line = None
    if low is not None and isfinite(low) and isfinite(high):
        line = tag("line", x1=at(low), x2=at(high), y1=f"{y:.1f}", y2=f"{y:.1f}")
    return tag(
        "g",
        tag("title", f"{shown} {verdict}".rstrip()),
        tag("text", name, x=NAMES - 8, y=f"{y + 4:.1f}", class_="end"),
        line,
        tag("circle", cx=at(middle), cy=f"{y:.1f}", r="3.5"),
        class_=f"estimate {CLASSES.get(verdict, '')}".rstrip(),
    )


def _findings(run: RunRecord, block: Block | None) -> Markup | None:
    """Return at most three sentences that a reader would draw from the results."""
    found = [*_contrasts(block)] if block is not None else []
    for name, row in run.summary.get("reward_models", {}).items():
        if accuracy := row.get("pair_accuracy"):
            found.append(f"{name} ranks {_interval(accuracy)} of the held-out pairs correctly.")
    return tag("ul", *(tag("li", line) for line in found[:3])) if found else None


def _contrasts(block: Block) -> Iterator[str]:
    metric, baseline = block["metrics"][0], block["baseline"]
    verdicts = {name: row[metric].get("verdict") for name, row in block["contrasts"].items()}
    title = metric.replace("_", " ")
    better = [name for name, verdict in verdicts.items() if verdict == "better"]
    if better:
        values = {name: block["models"][name][metric] for name in better}
        # Distance from no difference, so that metrics where lower is better are ranked as well.
        best = max(better, key=lambda n: abs(block["contrasts"][n][metric]["difference"][0] or 0.0))
        others = [name for name in better if name != best]
        also = f" Also better: {', '.join(others)}." if others else ""
        yield f"Best against {baseline} by {title}: {best}, {_interval(values[best])}.{also}"
    open_ = [name for name, verdict in verdicts.items() if verdict == NO_DIFFERENCE]
    worse = [name for name, verdict in verdicts.items() if verdict == "worse"]
    if open_:
        yield f"No significant difference from {baseline} by {title}: {', '.join(open_)}."
    if worse:
        yield f"Worse than {baseline} by {title}: {', '.join(worse)}."


def _interval(value: Sequence[float | None]) -> str:
    middle, low, high = value
    return even(middle) + ("" if low is None else f" [{even(low)}, {even(high)}]")
