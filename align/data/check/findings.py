"""Codes of the data check, and findings, of which the first few of each code are kept."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml

from align.core.errors import DataError
from align.core.text import suggest

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Code:
    """Meaning of a code: ``severity``, ``title``, ``why`` it matters and the ``remedy``."""

    code: str
    severity: Severity
    title: str
    why: str
    remedy: str


@lru_cache(maxsize=1)
def codes() -> dict[str, Code]:
    """Return the table of all codes."""
    text = Path(__file__).with_name("codes.yaml").read_text(encoding="utf-8")
    return {code: Code(code=code, **entry) for code, entry in yaml.safe_load(text).items()}


def code_of(name: str) -> Code:
    """Return the entry of a code.

    Raises:
        DataError: the code does not exist.
    """
    known = codes()
    if name.upper() not in known:
        advice = suggest(name.upper(), known) or "; align explain lists all codes"
        raise DataError(f"{name}: unknown code{advice}")
    return known[name.upper()]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        code: an entry of codes.yaml.
        source: ``file:line``, ``file:row N``, or the file alone.
        found: what was found there, without the place.
        column: counted from 1, if a position in the line is known.
        excerpt: the beginning of the row.
    """

    code: str
    source: str
    found: str
    column: int | None = None
    excerpt: str = ""

    @property
    def where(self) -> str:
        """Return the place, with its column if known."""
        return self.source if self.column is None else f"{self.source}:{self.column}"


@dataclass(slots=True)
class Tally:
    """Count findings by code and keep the first ``limit`` of each code."""

    limit: int
    counts: Counter[str] = field(default_factory=Counter)
    kept: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Count a finding."""
        self.counts[finding.code] += 1
        kept = self.kept.setdefault(finding.code, [])
        if len(kept) < self.limit:
            kept.append(finding)

    def merge(self, other: "Tally") -> None:
        """Add the findings of a later part."""
        self.counts += other.counts
        for code, findings in other.kept.items():
            kept = self.kept.setdefault(code, [])
            kept += findings[: self.limit - len(kept)]

    def drop(self, code: str) -> None:
        """Remove all findings of a code."""
        self.counts.pop(code, None)
        self.kept.pop(code, None)

    def findings(self) -> Iterable[Finding]:
        """Return the kept findings: errors first, then sorted by code."""
        order = sorted(self.kept, key=lambda code: (codes()[code].severity, code))
        return [finding for code in order for finding in self.kept[code]]

    def total(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(n for code, n in self.counts.items() if codes()[code].severity == severity)
