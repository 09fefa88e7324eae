"""Plant faults in a copy of the code and count those that the near tests find.

    python -m benchmarks.mutants                    # all tables of benchmarks/mutants/
    python -m benchmarks.mutants --table core       # one table
    python -m benchmarks.mutants --only "KL"        # those whose name contains the words
    python -m benchmarks.mutants --short            # a few, others each day
    python -m benchmarks.mutants --write            # also the sections of docs/mutants.md

A mutant is killed if one of its tests fails on it. Every test first runs on the unchanged copy. The
exit code is 1 if a mutant survives, if its tests fail without it, or if its text is not in the file
any more.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.mutants.page import render, write_page
from benchmarks.mutants.runs import Result, run_clean, run_mutants, take_copy
from benchmarks.mutants.tables import TableError, read_tables, rotating

SHORT = 6
"""Number of mutants of a short run."""


def main() -> int:
    """Run the chosen mutants, print one line for each, and return the exit code."""
    options = _options()
    try:
        mutants = [
            mutant
            for mutant in read_tables(options.table)
            if options.only.lower() in f"{mutant.name} {mutant.finding}".lower()
        ]
    except TableError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    if options.short:
        mutants = rotating([m for m in mutants if not m.slow], SHORT)
    if not mutants:
        sys.stdout.write("no mutant has these words in its name\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="align-mutants-") as folder:
        clean = Path(folder) / "clean"
        take_copy(clean)
        unchanged = run_clean(mutants, clean)
        if unchanged.verdict != "survived":
            sys.stdout.write(f"the tests fail without a mutant:\n{unchanged.told}\n")
            return 1
        results = run_mutants(mutants, clean, jobs=options.jobs, tell=_tell)
    sys.stdout.write(render(results))
    if options.write:
        write_page(results)
    return 0 if all(result.verdict == "killed" for result in results) else 1


def _tell(result: Result) -> None:
    line = f"{result.verdict:9s} {result.seconds:5.1f} s  {result.mutant.name}"
    by = f"  <- {result.test}" if result.test else ""
    sys.stdout.write(f"{line}{by}\n")
    if result.verdict == "broken":
        sys.stdout.write(f"{result.told}\n")
    sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants")
    parser.add_argument("--table", default="", help="name of one table")
    parser.add_argument("--only", default="", help="words of the mutants' names")
    parser.add_argument("--short", action="store_true", help=f"{SHORT} mutants, others each day")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at the same time")
    parser.add_argument(
        "--write", action="store_true", help="write its sections of docs/mutants.md"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
