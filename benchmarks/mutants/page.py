"""The scores and the table of findings, as they are printed and as docs/mutants.md shows them."""

import datetime
from collections.abc import Sequence

from benchmarks.mutants.runs import Result
from benchmarks.mutants.tables import ROOT

PAGE = ROOT / "docs" / "mutants.md"
MARK = "<!-- what follows is written by: python -m benchmarks.mutants --write -->\n"


def render(results: Sequence[Result]) -> str:
    """Return the score of each table, and one row for each past finding, as Markdown."""
    lines = ["", "| table | mutants | killed | score |", "|---|---|---|---|"]
    for table in sorted({result.mutant.table for result in results}):
        mine = [result for result in results if result.mutant.table == table]
        lines.append(_row(table, mine))
    lines.append(_row("all", results))
    alive = [result for result in results if result.verdict != "killed"]
    if alive:
        lines += ["", "| not killed | verdict |", "|---|---|"]
        lines += [f"| {result.mutant.name} | {result.verdict} |" for result in alive]
    past = [result for result in results if result.mutant.finding]
    if past:
        lines += ["", "| what was once wrong | fails if it comes back | verdict |", "|---|---|---|"]
        lines += [
            f"| {result.mutant.finding} | {_tests(result)} | {result.verdict} |" for result in past
        ]
    return "\n".join(lines) + "\n"


def _row(name: str, results: Sequence[Result]) -> str:
    killed = sum(result.verdict == "killed" for result in results)
    return f"| {name} | {len(results)} | {killed} | {100 * killed / len(results):.1f} % |"


def _tests(result: Result) -> str:
    file = result.mutant.tests[0].partition("::")[0].removeprefix("tests/")
    return f"{file}: `{result.test.partition('[')[0]}`" if result.test else file


def write_page(results: Sequence[Result]) -> None:
    """Replace what stands behind the mark of docs/mutants.md."""
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    date = datetime.date.today().isoformat()
    PAGE.write_text(f"{text}{MARK}\nMeasured on {date}.\n{render(results)}", encoding="utf-8")
