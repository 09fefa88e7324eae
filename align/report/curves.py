"""The section with the curves of every stage, and the charts that the page's script draws."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from align.core.log import EVALUATIONS_FILE
from align.report.charts import MAX_POINTS, Band, line_chart
from align.report.markup import Markup, duration, join, number, tag
from align.report.read import RunRecord, StageRecord, read_lines
from align.report.series import Chart, Line, intervals_of, panels_of

# Panels that are shown first, in this order; the others are folded.
FRONT = (
    "loss",
    "accuracy",
    "margin",
    "chosen_logprob",
    "good_reward",
    "bad_reward",
    "reward/mean",
    "kl/reference_per_answer",
    "policy/entropy",
    "policy/clip_frac",
    "length/mean",
    "length/truncated_frac",
    "reward/dead_group_frac",
    "value/explained_variance",
    "kl/reference",
    "policy/approx_kl",
    "optim/grad_norm",
    "policy/grad_norm",
    "optim/learning_rate",
)
NUM_FRONT = 8
PICTURE_POINTS = 24_000
"""Points of all pictures of a page together, as far as MIN_POINTS allows it."""
MIN_POINTS = 40


def charts_of(run: RunRecord) -> list[Chart]:
    """Return the charts of every stage that trains, in the order of the page."""
    charts = []
    for stage in run.stages:
        if not stage.metrics or stage.kind in ("evaluate", "merge"):
            continue
        evaluations = read_lines(run.directory / stage.name / EVALUATIONS_FILE, [])
        bands: Mapping[str, Band] = getattr(run.recipe.stages[stage.name], "expect", {})
        panels = panels_of(stage.metrics, intervals_of(evaluations))
        charts += [
            Chart(stage.name, title, panels[title], _band(bands, panels[title]))
            for title in sorted(panels, key=_rank)
        ]
    return charts


def varying(charts: Iterable[Chart]) -> list[Chart]:
    """Return the charts that have something to show: a line with two different values."""
    return [chart for chart in charts if not all(line.constant for line in chart.lines)]


def curves(run: RunRecord) -> Markup | None:
    """Return the section with the metric curves of every stage that logged metrics."""
    charts = charts_of(run)
    if not charts:
        return None
    # A run of many stages and metrics must stay one small file.
    num_lines = sum(len(chart.lines) for chart in charts)
    draw = partial(picture_of, limit=max(MIN_POINTS, min(MAX_POINTS, PICTURE_POINTS // num_lines)))
    blocks = [
        _stage(stage, own, draw)
        for stage in run.stages
        if (own := [chart for chart in charts if chart.group == stage.name])
    ]
    return tag("section", tag("h2", "Curves"), chart_controls(), overlay_place(), *blocks)


def chart_controls() -> Markup:
    """Return the place where the page's script puts the controls of all charts."""
    return tag("div", class_="chart-controls", data_chart_controls="", hidden="hidden")


def overlay_place() -> Markup:
    """Return the place where the page's script draws one metric of several stages."""
    caption = tag("figcaption", tag("b", "Stages in one chart"))
    return tag("figure", caption, data_overlay="", hidden="hidden", class_="overlay")


def _stage(stage: StageRecord, charts: Sequence[Chart], draw: Callable[[Chart], Markup]) -> Markup:
    # Choose the panels to show: those of FRONT, or any three if the stage has none of them.
    shown = varying(charts)
    num_front = sum(_rank(chart.title) < len(FRONT) for chart in shown)
    count = max(min(NUM_FRONT, num_front), min(3, len(shown)))
    more = None
    if rest := shown[count:]:
        more = tag(
            "details",
            tag("summary", f"{len(rest)} more: {', '.join(chart.title for chart in rest)}"),
            tag("div", *map(draw, rest), class_="charts"),
        )
    kind = "" if stage.kind == stage.name else f"{stage.kind}, "
    steps = f"{kind}{stage.metrics[-1].get('step')} steps, {duration(stage.seconds)}"
    return join(
        tag("h3", stage.name, tag("small", steps)),
        tag("div", *map(draw, shown[:count]), class_="charts"),
        constants(charts),
        more,
    )


def picture_of(chart: Chart, *, limit: int = MAX_POINTS) -> Markup:
    """Return a chart as a static picture, in whose place the page's script draws its own."""
    lines = [(line.label, line.points) for line in chart.lines]
    bounds = [[*zip(line.low, line.high, strict=True)] for line in chart.lines]
    return line_chart(chart.title, lines, band=chart.band, bounds=bounds, key=chart.id, limit=limit)


def constants(charts: Iterable[Chart]) -> Markup | None:
    """Return a sentence with the metrics that never change; None without any."""
    values: list[str] = []
    empty: list[str] = []
    for line in (line for chart in charts for line in _flat(chart)):
        known = [y for y in line.y if y is not None]
        if known:
            values.append(f"{line.name} {number(known[0])}")
        else:
            empty.append(line.name)
    parts = []
    if values:
        parts.append(f"The same at every step: {', '.join(values)}.")
    if empty:
        parts.append(f"No finite value logged: {', '.join(empty)}.")
    return tag("p", " ".join(parts), class_="quiet") if parts else None


def _flat(chart: Chart) -> Sequence[Line]:
    return chart.lines if all(line.constant for line in chart.lines) else ()


def _band(bands: Mapping[str, Band], lines: Sequence[Line]) -> Band | None:
    """Return the range that the recipe expects of one of the panel's metrics, if any."""
    names = [
        name
        for line in lines
        for name in bands
        if name in (line.label, f"{line.label}/{name.partition('/')[2]}")
    ]
    return bands[names[0]] if names else None


def _rank(title: str) -> int:
    return FRONT.index(title) if title in FRONT else len(FRONT)
