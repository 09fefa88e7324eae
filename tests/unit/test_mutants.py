"""The mutants: tables that fit the code, honest verdicts, and a few of them in every run."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutants import tables
from benchmarks.mutants.tables import TableError, read_tables, rotating

ROOT = Path(__file__).resolve().parents[2]
VERDICTS = """
from pathlib import Path
import sys
from benchmarks.mutants.runs import run_mutants, take_copy
from benchmarks.mutants.tables import Change, Mutant

def mutant(name, old, new):
    change = Change("align/losses/kl.py", old, new)
    return Mutant("table", name, (change,), ("tests/numeric/test_kl.py",), "", False)

K1 = "x = logprobs - ref_logprobs.detach()"
take_copy(Path(sys.argv[1]))
run_mutants(
    [
        mutant("same", K1, "x = logprobs + -ref_logprobs.detach()"),
        mutant("sign", K1, "x = ref_logprobs.detach() - logprobs"),
        mutant("no import", "import math", "import maths"),
        mutant("restored", K1, "x = (logprobs - ref_logprobs.detach())"),
    ],
    Path(sys.argv[1]),
    jobs=1,
    tell=lambda found: print(found.mutant.name, found.verdict, sep=": "),
)
"""


def test_every_text_that_a_mutant_replaces_stands_once_in_the_code():
    assert len(read_tables()) > 2


def write(folder: Path, **changed: str) -> None:
    row = {"name": "a", "file": "align/losses/kl.py", "old": "import math", "new": "pass"}
    row = row | {"tests": "tests/numeric/test_kl.py"} | changed
    lines = [f"  {key}: {value!r}" for key, value in row.items()]
    (folder / "own.yaml").write_text("-\n" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"old": "no such text"}, "occurs 0 times in align/losses/kl.py"),
        ({"old": "return"}, "times in align/losses/kl.py, expected once"),
        ({"new": "import ("}, "is no Python"),
        ({"tests": "tests/numeric/test_kl.py::test_gone"}, "there is no test"),
        ({"tests": "tests/numeric/gone.py"}, "there is no test"),
        ({"olt": "x"}, "unknown keys {'olt'}"),
    ],
)
def test_a_table_that_does_not_fit_the_code_is_an_error(tmp_path, monkeypatch, changed, words):
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    write(tmp_path)
    assert [mutant.name for mutant in read_tables()] == ["a"]
    write(tmp_path, **changed)
    with pytest.raises(TableError) as caught:
        read_tables()
    assert words in str(caught.value)


def test_short_runs_of_following_days_reach_every_mutant(monkeypatch):
    import datetime

    class Day(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date.fromordinal(number)

    monkeypatch.setattr(tables.datetime, "date", Day)
    mutants = [m for m in read_tables() if not m.slow]
    seen = set()
    for number in range(700_000, 700_000 + len(mutants)):  # noqa: B007 - Day reads it
        seen |= {mutant.name for mutant in rotating(mutants, 6)}
    assert seen == {mutant.name for mutant in mutants}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


@pytest.mark.slow
def test_verdicts_are_killed_survived_or_broken_and_the_copy_is_restored(tmp_path):
    told = python("-c", VERDICTS, str(tmp_path / "clean")).stdout.splitlines()
    assert told == ["same: survived", "sign: killed", "no import: broken", "restored: survived"]


@pytest.mark.slow
def test_the_mutants_of_today_are_killed():
    done = python("-m", "benchmarks.mutants", "--short")
    assert done.returncode == 0, done.stdout + done.stderr
