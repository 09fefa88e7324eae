"""Draw y over x as inline SVG: points with intervals, lines, and a note at one place."""

from collections.abc import Sequence
from dataclasses import dataclass

from align.report.charts import HEIGHT, WIDTH, draw_axes, place, ticks
from align.report.markup import Markup, tag

STANDALONE = """
svg { font: 11px system-ui, sans-serif; background: #fff }
.axes line { stroke: #ddd } text { fill: #444 } .end { text-anchor: end }
.middle { text-anchor: middle } polyline { fill: none; stroke-width: 1.6 }
.line1 { stroke: #0b62d6; fill: #0b62d6 } .line2 { stroke: #c2410c; fill: #c2410c }
.line3 { stroke: #4d7c0f; fill: #4d7c0f } polyline { fill: none !important }
.dashed { stroke-dasharray: 5 3 } .faint { opacity: 0.55 }
"""
"""Style of a picture that stands outside the report's page."""


@dataclass(frozen=True, slots=True)
class Series:
    """Hold one set of places.

    Attributes:
        label: its name in the caption; empty names nothing.
        points: (x, y). bounds: (low, high) of each y, None where unknown.
        style: ``line``, ``dashed`` or ``points``. colour: 1, 2 or 3.
    """

    label: str
    points: Sequence[tuple[float, float]]
    bounds: Sequence[tuple[float | None, float | None]] = ()
    style: str = "line"
    colour: int = 1


def plot(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, note: str = ""
) -> Markup:
    """Draw one panel with its caption."""
    known = [s for s in series if s.points]
    if not known:
        return tag("figure", tag("figcaption", tag("b", title), tag("small", " no number")))
    keys = [tag("span", tag("i", class_=f"key line{s.colour}"), s.label) for s in known if s.label]
    caption = tag("figcaption", tag("b", title), *keys, tag("small", note) if note else None)
    return tag("figure", caption, picture(title, known, x_label=x_label, y_label=y_label))


def picture(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, style: str | None = None
) -> Markup:
    """Give the svg element alone; ``style`` makes it a file of its own."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    ys += [b for s in series for pair in s.bounds for b in pair if b is not None]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    frame = (x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    axes = draw_axes(x_ticks, y_ticks, frame, (x_label, y_label))
    marks = [mark for s in series for mark in _marks(s, frame)]
    return tag(
        "svg", tag("style", Markup(style)) if style else None, axes, *marks,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title,
        xmlns="http://www.w3.org/2000/svg" if style else None,
    )  # fmt: skip


def _marks(series: Series, frame: tuple[float, float, float, float]) -> list[Markup]:
    name = f"line{series.colour}"
    places = [place(x, y, frame) for x, y in series.points]
    marks: list[Markup] = []
    for (x, _), (low, high) in zip(series.points, series.bounds, strict=False):
        if low is not None and high is not None:
            (px, bottom), (_, top) = place(x, low, frame), place(x, high, frame)
            marks.append(
                tag("line", x1=f"{px:.1f}", x2=f"{px:.1f}", y1=f"{bottom:.1f}", y2=f"{top:.1f}",
                    class_=f"{name} faint")
            )  # fmt: skip
    if series.style != "points" and len(places) > 1:
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashed = f"{name} dashed" if series.style == "dashed" else name
        marks.append(tag("polyline", points=where, class_=dashed))
    if series.style != "dashed":
        marks += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.2", class_=name)
                  for x, y in places]  # fmt: skip
    return marks
