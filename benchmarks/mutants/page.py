"""The score and the findings of each table, as printed and as docs/mutants.md shows them."""

import datetime
import re
from collections.abc import Sequence

from benchmarks.mutants.runs import Result
from benchmarks.mutants.tables import ROOT, read_tables

PAGE = ROOT / "docs" / "mutants.md"


def render(results: Sequence[Result]) -> str:
    """Return the score of each table, what was not killed, and the findings, as Markdown."""
    return "\n\n".join(_section(name, mine) for name, mine in _by_table(results).items()) + "\n"


def _by_table(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.mutant.table, []).append(result)
    return found


def _section(name: str, results: Sequence[Result]) -> str:
    alive = [result for result in results if result.verdict != "killed"]
    killed = len(results) - len(alive)
    score = 100 * killed / len(results)
    lines = [f"Table `{name}`: {killed} of {len(results)} mutants are killed, {score:.1f} %."]
    if alive:
        lines += ["", "| not killed | verdict |", "|---|---|"]
        lines += [f"| {result.mutant.name} | {result.verdict} |" for result in alive]
    past = [result for result in results if result.mutant.finding]
    if past:
        lines += ["", "| former bug | test that fails if it returns | verdict |"]
        lines += ["|---|---|---|"]
        lines += [
            f"| {result.mutant.finding} | {_test(result)} | {result.verdict} |" for result in past
        ]
    return "\n".join(lines)


def _test(result: Result) -> str:
    """Return the file and the function that failed, or the file alone if none did."""
    function = result.test.rpartition("::")[2].partition("[")[0]
    tests = result.mutant.tests
    near = next((t for t in tests if function and t.endswith(function)), tests[0])
    file = near.partition("::")[0].removeprefix("tests/")
    return f"{file}: `{function}`" if function else file


def write_page(results: Sequence[Result]) -> None:
    """Replace the sections of docs/mutants.md whose tables were run in full."""
    text = PAGE.read_text(encoding="utf-8")
    date = datetime.date.today().isoformat()
    for name, mine in _by_table(results).items():
        if len(mine) != len(read_tables(name)):
            continue
        begin, end = f"<!-- table {name} begins -->\n", f"<!-- table {name} ends -->\n"
        body = f"{begin}{_section(name, mine)}\n\nMeasured on {date}.\n{end}"
        old = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        text = old.sub(lambda _, body=body: body, text) if old.search(text) else f"{text}\n{body}"
    PAGE.write_text(text, encoding="utf-8")
