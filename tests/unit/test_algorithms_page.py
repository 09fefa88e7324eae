"""docs/algorithms.md names every algorithm and loss of the schema, and tests that exist."""

import re
from pathlib import Path
from typing import get_args

from align.recipe.algorithms import ALGORITHMS
from align.recipe.schema import DpoStage

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")


def test_every_algorithm_and_loss_has_its_line() -> None:
    losses = get_args(DpoStage.model_fields["loss"].annotation)
    without_critic = [name for name, found in ALGORITHMS.items() if not found.needs_critic]
    for name in (*without_critic, *losses):
        assert f"| `{name}` |" in PAGE, name


def test_every_test_that_the_page_names_exists() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", source, re.MULTILINE))
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert len(named) > 50
    assert not [name for name in named if name not in defined]


def test_the_figure_is_there() -> None:
    (figure,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGE)
    assert (ROOT / "docs" / figure).is_file()
