"""Tables of mutants: what is replaced by what, and which tests must notice."""

import ast
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TABLES = Path(__file__).parent


class TableError(Exception):
    """A table does not fit the code."""


@dataclass(frozen=True, slots=True)
class Change:
    """One replacement: ``old`` occurs exactly once in ``file``."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A planted fault.

    Attributes:
        table: name of its table. name: the fault in words.
        changes: replacements that make it.
        tests: node ids of the near tests, of which at least one must fail.
        finding: what was once wrong, if the mutant puts it back; else empty.
        slow: whether its tests take too long for a short run.
    """

    table: str
    name: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]
    finding: str
    slow: bool


def read_tables(name: str = "") -> list[Mutant]:
    """Return the mutants of one table, or of all.

    Raises:
        TableError: a key is unknown, a text does not occur exactly once, a mutant is no valid
            Python, or a test does not exist.
    """
    paths = [p for p in sorted(TABLES.glob("*.yaml")) if name in ("", p.stem)]
    if not paths:
        raise TableError(f"no table '{name}' in {TABLES}")
    found = [
        _mutant(path.stem, row)
        for path in paths
        for row in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    names = [mutant.name for mutant in found]
    errors = [f"{n}: two mutants have this name" for n in sorted(set(names)) if names.count(n) > 1]
    errors += [error for mutant in found for error in _errors(mutant)]
    if errors:
        raise TableError("\n".join(errors))
    return found


KEYS = {"name", "file", "old", "new", "also", "tests", "finding", "slow"}


def _mutant(table: str, row: dict) -> Mutant:
    unknown, missing = set(row) - KEYS, {"name", "file", "old", "new", "tests"} - set(row)
    if unknown or missing:
        raise TableError(f"{table}.yaml: {row}: unknown keys {unknown}, missing keys {missing}")
    changes = [{key: row[key] for key in ("file", "old", "new")}, *row.get("also", [])]
    tests = row["tests"] if isinstance(row["tests"], list) else [row["tests"]]
    return Mutant(
        table,
        row["name"],
        tuple(Change(**change) for change in changes),
        tuple(tests),
        row.get("finding", ""),
        row.get("slow", False),
    )


def _errors(mutant: Mutant) -> list[str]:
    where = f"{mutant.table}.yaml: '{mutant.name}'"
    found = []
    for change in mutant.changes:
        path = ROOT / change.file
        times = path.read_text(encoding="utf-8").count(change.old) if path.is_file() else 0
        if times != 1:
            found.append(f"{where}: its text occurs {times} times in {change.file}, expected once")
    if not found:
        found += [f"{where}: {error}" for error in _syntax(mutant)]
    for test in mutant.tests:
        file, _, function = test.partition("::")
        path = ROOT / file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if f"def {function.partition('[')[0]}(" not in text and (function or not text):
            found.append(f"{where}: there is no test {test}")
    return found


def _syntax(mutant: Mutant) -> list[str]:
    found = []
    for file, text in mutated(mutant, ROOT).items():
        try:
            if file.endswith(".py"):
                ast.parse(text)
        except SyntaxError as error:
            found.append(f"{file} is no Python with it: {error}")
    return found


def mutated(mutant: Mutant, root: Path) -> dict[str, str]:
    """Return the text of each file that a mutant changes."""
    texts: dict[str, str] = {}
    for change in mutant.changes:
        text = texts.get(change.file) or (root / change.file).read_text(encoding="utf-8")
        texts[change.file] = text.replace(change.old, change.new)
    return texts


def rotating(mutants: Sequence[Mutant], num: int) -> list[Mutant]:
    """Return ``num`` mutants, the next ones each day."""
    begin = num * datetime.date.today().toordinal()
    return [mutants[(begin + i) % len(mutants)] for i in range(min(num, len(mutants)))]
