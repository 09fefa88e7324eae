"""Losses and gradients beside TRL's trainers on one model and batch: the table of the docs."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.differential.cases import CASES, LACKS, Case

pytest.importorskip("trl", reason="TRL is the other side of every comparison")
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
# TRL's head computes in float32: over four seeds the largest gap of an agreeing case is 2e-6.
AGREE, DIFFER = 1e-5, 1e-3


@pytest.fixture(scope="module")
def table() -> list[str]:
    """Run the command as the page says, in a process of its own: TRL's trainers keep state."""
    command = [sys.executable, "-m", "benchmarks.differential"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    found = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert found.returncode == 0, found.stderr[-2000:]
    # Libraries print to the same stream as they are imported.
    return [line for line in found.stdout.splitlines() if line.startswith(("|", "- TRL only"))]


def cells(lines: list[str]) -> list[list[str]]:
    """Return the cells of the rows below the head of a table."""
    rows = [line for line in lines if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def complaints(case: Case, row: list[str]) -> list[str]:
    """Return what is wrong with a row: it must agree, or differ, as its case says."""
    loss, gradient, micro = (float(cell) if cell else None for cell in row[2:5])
    if case.differs:
        return [] if max(loss, gradient) > DIFFER else [f"{row}: does not differ any more"]
    found = [] if max(loss, gradient) < AGREE else [f"{row}: differs"]
    if micro is not None and case.splits and micro < DIFFER:
        found.append(f"{row}: does not differ in micro-batches any more")
    if micro is not None and not case.splits and micro > AGREE:
        found.append(f"{row}: differs in micro-batches")
    return found


def test_loss_and_every_gradient_equal_trl_or_differ_as_stated(table: list[str]) -> None:
    rows = cells(table)
    assert len(rows) == len(CASES)
    assert not [c for case, row in zip(CASES, rows, strict=True) for c in complaints(case, row)]


def test_the_page_shows_what_the_command_prints(table: list[str]) -> None:
    shown = PAGE.partition("<!-- differential -->\n")[2].partition("\n<!-- end")[0].splitlines()
    assert [x for x in shown if x.startswith("- ")] == [x for x in table if x.startswith("- ")]
    for there, here in zip(cells(shown), cells(table), strict=True):
        assert (there[:2], there[5]) == (here[:2], here[5])
        for a, b in zip(there[2:5], here[2:5], strict=True):
            # Rounding differs between processors; a stated difference does not.
            rounding = max(float(a or 0), float(b or 0)) < AGREE
            assert rounding or float(a) == pytest.approx(float(b), rel=0.1), (there, here)


def source(trainer: str) -> str:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "trainer" / f"{trainer}_trainer.py"
    # The losses are in `_compute_loss`, and in SFT's trainer, which has none, in `compute_loss`.
    return re.split(r"def _?compute_loss\(", path.read_text(encoding="utf-8"), maxsplit=1)[1]


def names(trainer: str, key: str) -> set[str]:
    """Return the values that TRL's loss compares a setting with."""
    text = source(trainer)
    single = set(re.findall(rf'\b{key} == "(\w+)"', text))
    several = re.findall(rf"\b{key} in \[([^\]]*)\]", text)
    return single | {name for group in several for name in re.findall(r'"(\w+)"', group)}


def compared(kind: str, key: str) -> set[str]:
    values = [case.theirs.get(key, ()) for case in CASES if case.kind == kind]
    return {name for value in values for name in ([value] if isinstance(value, str) else value)}


@pytest.mark.parametrize(
    ("kind", "key", "listed", "default"),
    [
        ("sft", "loss_type", "SFT `loss_type`", {"nll"}),
        ("dpo", "loss_type", "DPO `loss_type`", set()),
        ("dpo", "f_divergence_type", "DPO `f_divergence_type`", {"reverse_kl"}),
        ("kto", "loss_type", "KTO `loss_type`", {"kto"}),
        ("grpo", "loss_type", "GRPO `loss_type`", set()),
        ("grpo", "importance_sampling_level", None, set()),
    ],
)
def test_every_loss_of_trl_is_compared_or_listed_as_its_own(kind, key, listed, default) -> None:
    lacking = set(LACKS[listed]) if listed else set()
    assert names(kind, key) == compared(kind, key) | lacking | default
    assert not lacking & compared(kind, key)


def test_every_level_and_scale_of_grpo_is_compared_or_listed() -> None:
    keys = ("loss_type", "importance_sampling_level", "scale_rewards")
    found = {tuple(case.theirs.get(key) for key in keys) for case in CASES if case.kind == "grpo"}
    own = set(LACKS["GRPO `loss_type`"])
    sequence = set(LACKS['GRPO `loss_type` with `importance_sampling_level="sequence"`'])
    for loss_type in names("grpo", "loss_type") - own:
        for level in names("grpo", "importance_sampling_level"):
            missing = level == "sequence" and loss_type in sequence
            for scale in ("group", "batch", "none"):
                assert ((loss_type, level, scale) in found) is not missing
