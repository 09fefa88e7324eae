"""Show a report of the data check in the terminal or as JSON."""

import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from align.core.text import visible
from align.data.check.findings import codes
from align.data.check.run import Report

_COLORS = {"error": "red", "warning": "yellow"}
_QUANTILES = (("median", 0.5), ("95 %", 0.95), ("longest", 1.0))


def print_report(report: Report, console: Console) -> None:
    """Print the findings by code, at most a few of each, then a summary of the data."""
    for code in dict.fromkeys(finding.code for finding in report.tally.findings()):
        for line in _finding_lines(report, code):
            console.print(line)
    for line in _summary_lines(report):
        console.print(Text(visible(line)))
    console.print(verdict(report))


def _finding_lines(report: Report, code: str) -> Iterator[Text]:
    entry, count = codes()[code], report.tally.counts[code]
    times = "" if count == 1 else f" ({count:,} times)"
    colour = _COLORS[entry.severity]
    yield Text.assemble((f"{code} {entry.severity}", f"bold {colour}"), f": {entry.title}{times}")
    kept = report.tally.kept[code]
    for finding in kept:
        yield Text.assemble("  ", (_clean(finding.where), "bold"), f": {_clean(finding.found)}")
        if finding.excerpt:
            yield Text(f"      {_clean(finding.excerpt)}", style="dim")
    if count > len(kept):
        yield Text(f"  ... and {count - len(kept):,} more")
    yield Text(f"  -> {entry.remedy}", style="green")


def _clean(text: str) -> str:
    """Return text with control and bidirectional characters made visible."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _summary_lines(report: Report) -> Iterator[str]:
    """Yield the lines that summarize the data."""
    forms = ", ".join(f"{count:,} x {form}" for form, count in report.forms.most_common())
    files = f", {len(report.files)} files" if len(report.files) > 1 else ""
    kind = f"{report.kind} data{files}" if report.files else "not read"
    yield f"{report.path}: {kind}, {report.rows:,} rows, {report.good:,} good ({forms or 'none'})"
    for name, counts in (("roles", report.roles), ("labels", report.labels)):
        if counts:
            listed = ", ".join(f"{str(key).lower()} {n:,}" for key, n in counts.most_common())
            yield f"  {name}: {listed}"
    for name, values in (("characters per row", report.lengths), ("tokens", report.tokens)):
        if len(values):
            numbers = np.quantile(values, [q for _, q in _QUANTILES])
            pairs = zip(_QUANTILES, numbers, strict=True)
            yield f"  {name}: " + ", ".join(f"{what} {number:,.0f}" for (what, _), number in pairs)
    if report.longer:
        longer = ", ".join(f"{side} {count:,}" for side, count in report.longer.most_common())
        yield f"  longer response of a pair (words): {longer}"
    if report.barren:
        yield f"  {report.barren:,} rows contain no example of this kind"
    for note in report.notes:
        yield from textwrap.wrap(f"  {note}", 100, subsequent_indent="  ")


def verdict(report: Report) -> Text:
    """Return the verdict: clean, or the number of errors and warnings with their codes."""
    tally = report.tally
    errors, warnings = tally.total("error"), tally.total("warning")
    if not errors and not warnings:
        return Text("clean", style="bold green")
    listed = ", ".join(f"{code} {count:,}" for code, count in sorted(tally.counts.items()))
    colour = _COLORS["error" if errors else "warning"]
    counts = f"{_many(errors, 'error')}, {_many(warnings, 'warning')}"
    return Text.assemble(
        (counts, f"bold {colour}"), f": {listed}; run align explain CODE for details"
    )


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as plain values."""
    lengths = {
        what: float(np.quantile(report.lengths, q)) if report.good else None
        for what, q in _QUANTILES
    }
    return {
        "path": report.path,
        "kind": report.kind,
        "files": report.files,
        "rows": report.rows,
        "good_rows": report.good,
        "rows_without_example": report.barren,
        "formats": dict(report.forms),
        "roles": dict(report.roles),
        "labels": {str(label).lower(): count for label, count in report.labels.items()},
        "characters": lengths,
        "errors": report.tally.total("error"),
        "warnings": report.tally.total("warning"),
        "counts": dict(sorted(report.tally.counts.items())),
        "findings": [
            {
                "code": finding.code,
                "severity": codes()[finding.code].severity,
                "title": codes()[finding.code].title,
                "source": finding.source,
                "column": finding.column,
                "found": finding.found,
                "excerpt": finding.excerpt,
                "remedy": codes()[finding.code].remedy,
            }
            for finding in report.tally.findings()
        ],
        "notes": report.notes,
    }
