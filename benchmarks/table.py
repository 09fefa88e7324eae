"""Write the tables of benchmarks/README.md, one per model shape, from benchmarks/results."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.rows import ROWS

HERE = Path(__file__).parent
SHAPES = ("10.5M", "135M")
BEGIN, END = "<!-- table {} -->", "<!-- end of table {} -->"
HEAD = (
    "work",
    "to reach",
    "ratio, wall (least to most)",
    "ratio, CPU time",
    "align",
    "other side",
    "of the roof, align / other",
    "peak memory, align / other",
    "same numbers",
    "GPU",
)


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table as Markdown.

    Args:
        results: what `benchmarks.run` wrote, by name of the row; a row without is "not measured".
    """
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for name, row in ROWS.items():
        found = results.get(name)
        cells = ["not measured"] * (len(HEAD) - 2) if found is None else _cells(found)
        lines.append("| " + " | ".join([row.title, f">= {row.target}", *cells]) + " |")
    return "\n".join(lines)


def _cells(found: Mapping[str, Any]) -> list[str]:
    ratio, ours, theirs = found["ratio"], found["ours"], found["theirs"]
    shares = [s.get("roof_share") for s in (ours, theirs)]
    memory = [s["peak_mib"] / 1024 for s in (ours, theirs)]
    rates = [f"{s['rate']['median']:.3g} {found['unit']}/s" for s in (ours, theirs)]
    return [
        f"**{ratio['median']:.2f}** ({ratio['min']:.2f} to {ratio['max']:.2f})",
        f"{found['cpu_ratio']:.2f}",
        *rates,
        "-" if None in shares else f"{shares[0]:.0%} / {shares[1]:.0%}",
        f"{memory[0]:.2f} / {memory[1]:.2f} GiB",
        {None: "-", True: "yes", False: "NO"}[found.get("same", {}).get("equal")],
        "not measured",
    ]


def main() -> None:
    """Put each table between its two marks."""
    results: dict[str, dict[str, Any]] = {shape: {} for shape in SHAPES}
    for path in sorted((HERE / "results" / "cpu").glob("*.bfloat16.1t.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        results[found["shape"]][found["row"]] = found
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    for shape in SHAPES:
        begin, end = BEGIN.format(shape), END.format(shape)
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{render(results[shape])}\n{end}{after}"
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
