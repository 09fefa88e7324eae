"""Draw curves as inline SVG: labeled axes, gaps where a number is missing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from align.core.metrics import described
from align.report.markup import Markup, join, number, tag

Points = list[tuple[float, float | None]]
Band = tuple[float | None, float | None]
"""Lower and upper bound that a recipe expects of a metric; None for no bound."""
WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 10, 36
LONG_TICK = 6
"""Characters of a tick label that leave room for the label of the y axis beside it."""
MAX_POINTS = 240
NUM_COLORS = 8


def unit_of(name: str) -> str:
    """Return the unit of a metric; empty for a plain number and for an unknown one."""
    metric = described(name)
    return metric.unit if metric is not None else ""


def ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """Return round tick values that span [low, high]: multiples of 1, 2 or 5 times 10^k.

    Args:
        low: smallest value.
        high: largest value; if it equals ``low`` but for rounding, the range is widened by 10 % on
            each side.
        count: approximate number of steps.
    """
    # Means of equal numbers differ in their last digits, which are not a range to draw.
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    # The tolerances absorb rounding: 0.3 / 0.1 must count as 3 steps.
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin(points: Points, limit: int = MAX_POINTS) -> tuple[Points, int]:
    """Return at most ``limit`` points, each the mean of a run, and the length of the runs."""
    run = max(1, math.ceil(len(points) / limit))
    if run == 1:
        return points, 1
    kept: Points = []
    for i in range(0, len(points), run):
        part = points[i : i + run]
        known = [y for _, y in part if y is not None]
        kept.append((part[-1][0], sum(known) / len(known) if known else None))
    return kept, run


def line_chart(
    title: str,
    series: Sequence[tuple[str, Points]],
    *,
    band: Band | None = None,
    bounds: Sequence[Sequence[Band]] = (),
    x_label: str = "step",
    key: str | None = None,
    limit: int = MAX_POINTS,
) -> Markup:
    """Return a line chart of a metric over the step, with its unit.

    Args:
        title: the metric's name.
        series: (label, points) of the lines; a y of None leaves a gap.
        band: range that the recipe expects, shaded.
        bounds: (low, high) of each point of each line; a line that is thinned has none.
        x_label: label of the x axis.
        key: name of the chart in the data of the page's script.
        limit: largest number of points of a line.
    """
    thinned = [(label, *thin(points, limit)) for label, points in series]
    known = [(x, y) for _, points, _ in thinned for x, y in points if y is not None]
    if not known:
        return tag("figure", tag("figcaption", title, tag("small", " no finite value logged")))
    spread = _spread(thinned, bounds)
    # Scale: the y axis ends at round ticks, the x axis at the data.
    xs, ys = [x for x, _ in known], [y for _, y in known]
    ys += [y for *_, low, high in spread for y in (low, high)]
    first, end, y_ticks = min(xs), max(xs), ticks(min(ys), max(ys))
    frame = (first, end if end > first else first + 1, y_ticks[0], y_ticks[-1])
    # Marks, labels and axes.
    drawn = (_segments(points, frame, line_class(i)) for i, (_, points, _) in enumerate(thinned))
    lines = [mark for marks in drawn for mark in marks]
    whiskers = [_whisker((x, low, high), frame, line_class(i)) for i, x, low, high in spread]
    run = max(run for _, _, run in thinned)
    x_label = f"{x_label} (each point the mean of {run})" if run > 1 else x_label
    inside = [x for x in ticks(first, end) if frame[0] <= x <= frame[1]]
    axes = _draw_axes(inside, y_ticks, frame, labels=(x_label, unit_of(title) or "value"))
    svg = tag(
        "svg",
        axes,
        _shade(band, frame),
        *whiskers,
        *lines,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title} over {x_label}",
    )
    return tag("figure", _caption(title, thinned), svg, data_chart=key)


def _spread(
    thinned: Sequence[tuple[str, Points, int]], bounds: Sequence[Sequence[Band]]
) -> list[tuple[int, float, float, float]]:
    """Return line, x, low and high of each point that has bounds; thinned lines have none."""
    return [
        (i, x, low, high)
        for i, ((_, points, run), pairs) in enumerate(zip(thinned, bounds, strict=False))
        for (x, _), (low, high) in zip(points, pairs, strict=False)
        if run == 1 and low is not None and high is not None
    ]


def line_class(place: int) -> str:
    """Return the class that colors the line at a place; the colors repeat."""
    return f"line{place % NUM_COLORS + 1}"


def _shade(band: Band | None, frame: tuple[float, float, float, float]) -> Markup | None:
    if band is None:
        return None
    low = frame[2] if band[0] is None else min(max(band[0], frame[2]), frame[3])
    high = frame[3] if band[1] is None else min(max(band[1], frame[2]), frame[3])
    left, top = place(frame[0], high, frame)
    right, bottom = place(frame[1], low, frame)
    size = {"width": f"{right - left:.1f}", "height": f"{max(0.0, bottom - top):.1f}"}
    return tag("rect", x=f"{left:.1f}", y=f"{top:.1f}", class_="band", **size)


def _caption(title: str, thinned: Sequence[tuple[str, Points, int]]) -> Markup:
    metric = described(title)
    # The browser shows the meaning when the pointer rests on the name.
    parts: list[object] = [tag("b", title, title=metric.meaning if metric is not None else None)]
    for i, (label, points, _) in enumerate(thinned):
        last = next((y for _, y in reversed(points) if y is not None), None)
        text = f"{label} {number(last)}" if len(thinned) > 1 else f"last {number(last)}"
        parts.append(tag("span", tag("i", class_=f"key {line_class(i)}"), text))
    return tag("figcaption", *parts)


def place(x: float, y: float, frame: tuple[float, float, float, float]) -> tuple[float, float]:
    """Return the pixel position of (x, y) in a picture with the axes (x0, x1, y0, y1)."""
    x0, x1, y0, y1 = frame
    return (
        LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
        TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
    )


def _segments(
    points: Points, frame: tuple[float, float, float, float], class_: str
) -> list[Markup]:
    # Split at missing values: a line across a gap would invent data.
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            parts.append([])
        else:
            parts[-1].append(place(x, y, frame))
    # A polyline of one point is invisible, so a lone point becomes a circle.
    drawn = []
    for part in parts:
        if len(part) == 1:
            (cx, cy) = part[0]
            drawn.append(tag("circle", cx=f"{cx:.1f}", cy=f"{cy:.1f}", r="2.5", class_=class_))
        elif part:
            where = " ".join(f"{x:.1f},{y:.1f}" for x, y in part)
            drawn.append(tag("polyline", points=where, class_=class_))
    return drawn


def _draw_axes(
    x_ticks: list[float],
    y_ticks: list[float],
    frame: tuple[float, float, float, float],
    *,
    labels: tuple[str, str],
) -> Markup:
    """Return the grid lines, tick labels and axis labels.

    Args:
        x_ticks: values of the vertical marks.
        y_ticks: values of the horizontal grid lines.
        frame: the axes' ranges (x0, x1, y0, y1).
        labels: (x label, y label).
    """
    bottom = HEIGHT - BOTTOM
    marks: list[Markup] = []
    for value in y_ticks:
        _, y = place(frame[0], value, frame)
        marks.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}"))
        marks.append(
            tag("text", tick_label(value, y_ticks), x=LEFT - 5, y=f"{y + 4:.1f}", class_="end")
        )
    for value in x_ticks:
        x, _ = place(value, frame[2], frame)
        marks.append(
            tag("text", tick_label(value, x_ticks), x=f"{x:.1f}", y=bottom + 15, class_="middle")
        )
    middle = (TOP + bottom) / 2
    marks.append(
        tag("text", labels[0], x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 4, class_="middle")
    )
    # Beside the tick labels; inside the plot where these are so long that they would meet.
    if any(len(tick_label(value, y_ticks)) > LONG_TICK for value in y_ticks):
        marks.append(tag("text", labels[1], x=LEFT + 4, y=TOP + 10))
    else:
        turn = f"rotate(-90 11 {middle:.1f})"
        marks.append(
            tag("text", labels[1], x=11, y=f"{middle:.1f}", transform=turn, class_="middle")
        )
    return tag("g", join(*marks), class_="axes")


def tick_label(value: float, all_ticks: Sequence[float]) -> str:
    """Return a tick's label with as many decimals as the tick spacing needs."""
    step = all_ticks[1] - all_ticks[0] if len(all_ticks) > 1 else abs(value) or 1.0
    biggest = max(abs(v) for v in all_ticks)
    # Floating-point noise around zero must not become "-0.0" or "1e-17".
    if abs(value) < step * 1e-6:
        return "0"
    if biggest < 1e-3 or biggest >= 1e6:
        return f"{value:.{max(0, math.floor(math.log10(biggest / step) + 1e-9))}e}"
    if step >= 1000 and all(abs(v / 1000 - round(v / 1000)) < 1e-6 for v in all_ticks):
        return f"{value / 1000:.0f}k"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


STANDALONE = """
svg { font: 11px system-ui, sans-serif; background: #fff }
.axes line { stroke: #ddd } text { fill: #444 } .end { text-anchor: end }
.middle { text-anchor: middle } polyline { fill: none; stroke-width: 1.6 }
.line1 { stroke: #0b62d6; fill: #0b62d6 } .line2 { stroke: #c2410c; fill: #c2410c }
.line3 { stroke: #4d7c0f; fill: #4d7c0f } polyline { fill: none !important }
.dashed { stroke-dasharray: 5 3 } .faint { opacity: 0.55 }
"""
"""Style sheet of an SVG file that is used outside the report's page."""


@dataclass(frozen=True, slots=True)
class Series:
    """One data series of a plot.

    Attributes:
        label: name in the caption; an empty label is not listed.
        points: (x, y) of each point.
        bounds: (low, high) of each point's interval; None where unknown.
        style: ``line``, ``dashed`` or ``points``.
        colour: index of the color: 1, 2 or 3.
    """

    label: str
    points: Sequence[tuple[float, float]]
    bounds: Sequence[tuple[float | None, float | None]] = ()
    style: str = "line"
    colour: int = 1


def plot(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, note: str = ""
) -> Markup:
    """Return a figure with one plot and its caption."""
    known = [s for s in series if s.points]
    if not known:
        return tag("figure", tag("figcaption", tag("b", title), tag("small", " no data")))
    keys = [tag("span", tag("i", class_=f"key line{s.colour}"), s.label) for s in known if s.label]
    caption = tag("figcaption", tag("b", title), *keys, tag("small", note) if note else None)
    return tag("figure", caption, picture(title, known, x_label=x_label, y_label=y_label))


def picture(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, style: str | None = None
) -> Markup:
    """Return the svg element alone; with ``style`` it is a complete SVG file."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    ys += [b for s in series for pair in s.bounds for b in pair if b is not None]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    frame = (x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    axes = _draw_axes(x_ticks, y_ticks, frame, labels=(x_label, y_label))
    marks = [mark for s in series for mark in _marks(s, frame)]
    return tag(
        "svg",
        tag("style", Markup(style)) if style else None,
        axes,
        *marks,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
        xmlns="http://www.w3.org/2000/svg" if style else None,
    )


def _whisker(
    bar: tuple[float, float, float], frame: tuple[float, float, float, float], class_: str
) -> Markup:
    """Return the interval (x, low, high) of a point as a vertical line."""
    x, low, high = bar
    (px, bottom), (_, top) = place(x, low, frame), place(x, high, frame)
    ends = {"y1": f"{bottom:.1f}", "y2": f"{top:.1f}"}
    return tag("line", x1=f"{px:.1f}", x2=f"{px:.1f}", **ends, class_=f"{class_} faint")


def _marks(series: Series, frame: tuple[float, float, float, float]) -> list[Markup]:
    name = f"line{series.colour}"
    places = [place(x, y, frame) for x, y in series.points]
    marks: list[Markup] = []
    # Intervals first, so that lines and points are drawn over them. Bounds may be empty.
    for (x, _), (low, high) in zip(series.points, series.bounds, strict=False):
        if low is not None and high is not None:
            marks.append(_whisker((x, low, high), frame, name))
    if series.style != "points" and len(places) > 1:
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashed = f"{name} dashed" if series.style == "dashed" else name
        marks.append(tag("polyline", points=where, class_=dashed))
    if series.style != "dashed":
        marks += [
            tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.2", class_=name) for x, y in places
        ]
    return marks
