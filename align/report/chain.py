"""Draw the stage graph: one box per stage, in the column of its depth, and arrows for inputs."""

from collections.abc import Sequence
from itertools import pairwise

from align.report.markup import Markup, duration, tag
from align.report.read import StageRecord

Item = tuple[str, int]
"""(name, column) of what occupies space: a stage's box, or the lane of an arrow that passes."""

BOX_WIDTH, BOX_HEIGHT, LANE_HEIGHT, GAP_X, GAP_Y = 136, 58, 8, 42, 16
SIGNS = {
    "done": "✓ done",
    "changed": "≠ recipe changed",
    "unfinished": "… unfinished",
    "not started": "○ not started",
}


def depths(stages: Sequence[StageRecord]) -> dict[str, int]:
    """Return each stage's column: one more than the deepest stage that it depends on."""
    found: dict[str, int] = {}
    for stage in stages:
        found[stage.name] = 1 + max(
            (found[name] for name in stage.needs if name in found), default=-1
        )
    return found


def direct_edges(stages: Sequence[StageRecord]) -> list[tuple[str, str]]:
    """Return the edges of the graph's transitive reduction as (from, to)."""
    # An edge is dropped if another input of the stage already depends on its start.
    above: dict[str, set[str]] = {}
    for stage in stages:
        above[stage.name] = set(stage.needs).union(*(above.get(n, set()) for n in stage.needs))
    return [
        (name, stage.name)
        for stage in stages
        for name in stage.needs
        if not any(name in above.get(other, set()) for other in stage.needs)
    ]


def chain_picture(stages: Sequence[StageRecord]) -> Markup:
    """Return the graph of the stages with their status and wall time."""
    routes = [_route(a, b, depths(stages)) for a, b in direct_edges(stages)]
    columns, height = _columns(stages, routes)
    middles = {item: y for column in columns for item, y in column.items()}
    width = len(columns) * (BOX_WIDTH + GAP_X) - GAP_X + 8
    arrows = [_arrow([(item[1], middles[item]) for item in route]) for route in routes]
    boxes = [
        _box(stage, _left(column), middles[(stage.name, column)] - BOX_HEIGHT / 2)
        for stage in stages
        for column in [depths(stages)[stage.name]]
    ]
    svg = tag(
        "svg",
        *arrows,
        *boxes,
        viewBox=f"0 0 {width} {height:.0f}",
        width=width,
        height=f"{height:.0f}",
        role="img",
        aria_label="the stages and what each takes",
    )
    return tag("div", svg, tabindex="0", class_="wide chain")


def _route(start: str, end: str, depth: dict[str, int]) -> list[Item]:
    """Return the items that an edge passes: both boxes, and a lane in each column between."""
    lanes = [(f"{start}>{end}", column) for column in range(depth[start] + 1, depth[end])]
    return [(start, depth[start]), *lanes, (end, depth[end])]


def _columns(
    stages: Sequence[StageRecord], routes: Sequence[Sequence[Item]]
) -> tuple[list[dict[Item, float]], float]:
    """Return the vertical middle of every item, column by column, and the picture's height.

    Each column is sorted by the mean rank of its items' predecessors (the barycenter heuristic),
    which keeps arrows from crossing.
    """
    boxes: set[Item] = {(name, column) for name, column in depths(stages).items()}
    items = list(dict.fromkeys([*sorted(boxes), *(item for route in routes for item in route)]))
    order = {stage.name: i for i, stage in enumerate(stages)}
    before: dict[Item, list[Item]] = {}
    for route in routes:
        for a, b in pairwise(route):
            before.setdefault(b, []).append(a)
    # Order each column; the first sort is the tie-break of the second.
    columns: list[list[Item]] = []
    rank: dict[Item, float] = {}
    for column in range(1 + max(column for _, column in items)):
        mine = [item for item in items if item[1] == column]
        mine.sort(key=lambda item: order.get(item[0].split(">")[-1], 0))
        mine.sort(key=lambda item: _mean([rank[b] for b in before.get(item, [])]))
        rank.update({item: i - (len(mine) - 1) / 2 for i, item in enumerate(mine)})
        columns.append(mine)
    # Center every column in the height of the tallest one.
    heights = [
        sum((BOX_HEIGHT if item in boxes else LANE_HEIGHT) + GAP_Y for item in mine) - GAP_Y
        for mine in columns
    ]
    placed = []
    for mine, own in zip(columns, heights, strict=True):
        y, middles = 4 + (max(heights) - own) / 2, {}
        for item in mine:
            size = BOX_HEIGHT if item in boxes else LANE_HEIGHT
            middles[item] = y + size / 2
            y += size + GAP_Y
        placed.append(middles)
    return placed, max(heights) + 8


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _left(column: int) -> float:
    return 4 + column * (BOX_WIDTH + GAP_X)


def _arrow(places: Sequence[tuple[int, float]]) -> Markup:
    (column, y), *rest = places
    path = f"M{_left(column) + BOX_WIDTH:.0f} {y:.0f}"
    for column, next_y in rest:
        # The last segment ends before the box to leave room for the arrowhead.
        x = _left(column) - (3 if column == places[-1][0] else 0)
        start, half = _left(column) - GAP_X, GAP_X / 2
        path += f" C{start + half:.0f} {y:.0f} {x - half:.0f} {next_y:.0f} {x:.0f} {next_y:.0f}"
        if column != places[-1][0]:
            path += f" h{BOX_WIDTH}"
        y = next_y
    return tag("path", d=f"{path} m-6 -4 l6 4 l-6 4", class_="arrow")


def _box(stage: StageRecord, x: float, y: float) -> Markup:
    middle = x + BOX_WIDTH / 2
    name = stage.name if len(stage.name) <= 17 else stage.name[:16] + "…"
    kind = "" if stage.kind == stage.name else f"{stage.kind} · "
    return tag(
        "g",
        tag("title", f"{stage.name}: {stage.kind}, {stage.status}"),
        tag("rect", x=x, y=y, width=BOX_WIDTH, height=BOX_HEIGHT, rx=8),
        tag("text", name, x=middle, y=y + 20, class_="name"),
        tag("text", f"{kind}{duration(stage.seconds)}", x=middle, y=y + 35),
        tag("text", SIGNS[stage.status], x=middle, y=y + 50, class_="status"),
        class_="box " + stage.status.replace(" ", "-"),
    )
