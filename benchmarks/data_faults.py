"""Measure the data check on seeded faults: found, right line, and false alarms on clean files.

    python -m benchmarks.data_faults            # the table of docs/data-check.md

Every file of tests/fault_corpus.py and tests/fault_files.py holds one fault. It counts as found
when its code is reported, as placed when that is at the line or row where the fault was put. Any
other code on the file is a false alarm.
"""

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from align.data.check import Request, check_data
from tests.fault_corpus import FORMATS, Case, clean_rows, row_cases, write_rows
from tests.fault_files import file_cases

KINDS = ("sft", "preference", "unpaired", "prompts", "math")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the check found in one file."""

    case: Case
    found: bool
    placed: bool
    others: tuple[str, ...]


def outcomes() -> Iterator[Outcome]:
    """Check every faulty file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, cases in (("rows", row_cases), ("files", file_cases)):
            (folder / part).mkdir()
            for case, path in cases(folder / part):
                yield _outcome(case, path)


def _outcome(case: Case, path: Path) -> Outcome:
    report = check_data(Request(path=str(path), kind=case.kind, limit=1000))
    findings = list(report.tally.findings())
    places = [f.source.removeprefix(str(path)) for f in findings if f.code == case.code]
    others = sorted({f.code for f in findings} - {case.code})
    # A file without any good row is also one without rows.
    others = [code for code in others if code != "D012"]
    return Outcome(case, bool(places), bool(places) and places[0] == case.place, tuple(others))


def clean_alarms() -> dict[str, int]:
    """Check clean made-up files of every kind and format; give the findings by file."""
    alarms = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for form in FORMATS:
                path = Path(folder) / f"{kind}.{form}"
                write_rows(clean_rows(kind, 7, 60), path, form)
                report = check_data(Request(path=str(path)))
                alarms[path.name] = report.tally.counts.total() + (report.kind != kind)
    return alarms


def table(found: list[Outcome]) -> list[str]:
    """Write the outcomes as a Markdown table, one row a fault."""
    by_fault: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in found:
        by_fault[outcome.case.code, outcome.case.fault].append(outcome)
    lines = [
        "| code | fault | files | found | right place | formats |",
        "|---|---|---|---|---|---|",
    ]
    for (code, fault), group in sorted(by_fault.items()):
        forms = ", ".join(dict.fromkeys(o.case.form for o in group))
        counts = f"{len(group)} | {sum(o.found for o in group)} | {sum(o.placed for o in group)}"
        lines.append(f"| {code} | {fault} | {counts} | {forms} |")
    return lines


def main() -> None:
    """Print the table and the sums."""
    found = list(outcomes())
    alarms = clean_alarms()
    faults = {(o.case.code, o.case.fault) for o in found}
    total = len(found)
    lines = table(found)
    lines += [
        "",
        f"{len(faults)} faults in {total} files: {sum(o.found for o in found)} found, "
        f"{sum(o.placed for o in found)} at the right place, "
        f"{sum(bool(o.others) for o in found)} with another finding as well; "
        f"{sum(alarms.values())} findings on {len(alarms)} clean files.",
    ]
    for o in found:
        if not (o.found and o.placed) or o.others:
            lines.append(
                f"- {o.case.fault} ({o.case.form}): found {o.found}, "
                f"place {o.placed}, also {', '.join(o.others) or 'nothing'}"
            )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
