"""The data section: rows that each stage kept, dropped or truncated, with the reasons."""

from collections import Counter
from pathlib import Path

from align.report.markup import Markup, join, number, table, tag
from align.report.read import RunRecord, read_lines

LEDGER_FILE = "ledger.jsonl"
NUM_SHOWN = 5
PROMPT_CUT = "prompt cut"
"""The only reason in the ledger whose rows are kept."""


def ledger(run: RunRecord) -> Markup | None:
    """Return the section with each stage's kept, dropped and truncated rows, by reason."""
    blocks = [
        _stage(run.directory / stage.name, stage.name, stage.manifest.get("metrics", {}))
        for stage in run.stages
        if (run.directory / stage.name / LEDGER_FILE).is_file()
    ]
    if not blocks:
        return None
    return tag("section", tag("h2", "Data ledger"), *blocks)


def _stage(folder: Path, name: str, metrics: dict[str, float]) -> Markup:
    rows = read_lines(folder / LEDGER_FILE, [])
    counts = Counter(str(row.get("reason")) for row in rows)
    kept = metrics.get("rows/kept")
    summary = "" if kept is None else f"{number(kept)} rows kept, "
    summary += f"{len(rows) - counts[PROMPT_CUT]} dropped"
    lines: list[list[object]] = []
    for reason, count in counts.most_common():
        examples = [row for row in rows if row.get("reason") == reason][:NUM_SHOWN]
        shown = join(*(tag("div", _line(row)) for row in examples))
        lines.append([reason, count, shown])
    return join(
        tag("h3", name, tag("small", summary)),
        table(["reason", "rows", "first examples"], lines) if lines else None,
    )


def _line(row: dict) -> str:
    rest = {k: v for k, v in row.items() if k not in ("reason", "source")}
    details = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"{row.get('source')}: {details}"[:200]
