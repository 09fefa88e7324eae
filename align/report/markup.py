"""Build HTML and SVG with escaping by construction: everything except ``Markup`` is escaped."""

import html
from collections.abc import Sequence


class Markup(str):
    """A string that is already valid markup and is inserted unescaped."""

    __slots__ = ()


VOID = frozenset({"meta", "br", "hr", "line", "path", "rect", "circle", "polyline"})


def tag(_name: str, *children: object, **attributes: object) -> Markup:
    """Return one element.

    Args:
        _name: element name.
        children: ``Markup`` is inserted unchanged, None is skipped, anything else is escaped.
        attributes: a trailing underscore is dropped (``class_``), other underscores become
            hyphens; an attribute of None is omitted.
    """
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if _name in VOID:
        return Markup(f"<{_name}{pairs}/>")
    return Markup(f"<{_name}{pairs}>{join(*children)}</{_name}>")


def join(*children: object) -> Markup:
    """Return the concatenated children; everything except ``Markup`` is escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(str(child))
            for child in children
            if child is not None
        )
    )


def table(
    head: Sequence[object], rows: Sequence[Sequence[object]], *, class_: str | None = None
) -> Markup:
    """Return a table that scrolls horizontally; the first cell of a row is its header."""
    lines = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
            tag("tbody", *lines),
            class_=class_,
        ),
        # Keyboard users scroll it with the arrows.
        tabindex="0",
        class_="wide",
    )


def number(value: float | None) -> str:
    """Return a number as text (1,234, 0.432 or 2.5e-05), or a dash for None."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.3f}".rstrip("0").rstrip(".") if value != int(value) else f"{value:.0f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.2g}"


def even(value: float | None) -> str:
    """Return a number with a fixed number of decimals for table columns: 0.710, 12.45."""
    if value is None or abs(value) >= 1000:
        return number(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def triple(value: Sequence[float | None] | None, *more: Markup | None) -> Markup | str:
    """Return [value, low, high] as a value with its interval below, or a dash for no value."""
    if not value or value[0] is None:
        return "-"
    middle, low, high = value
    spread = None if low is None else tag("small", f"[{even(low)}, {even(high)}]")
    return tag("div", even(middle), spread, *more, class_="triple")


def duration(seconds: float | None) -> str:
    """Return a duration as text: 4.2 s, 42 s, 3 min 5 s or 2 h 10 min."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
