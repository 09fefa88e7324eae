"""Every metric has one description, which the docs, the report and ``align explain`` show.

Runs of the stages check their own names: ``numbers`` in tests/e2e/stage_runs.py.
"""

import re
from pathlib import Path

import pytest

from align.cli.data import explain
from align.core.errors import DataError
from align.core.log import HEADLINE
from align.core.metrics import described, metrics, page
from align.pipeline.progress import SHOWN
from align.report.curves import FRONT
from align.training import causes

ROOT = Path(__file__).parents[2]


def test_the_page_is_the_table() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert text.endswith("\n".join(page()).rstrip() + "\n")


def test_metrics_that_the_code_reads_are_described() -> None:
    read = re.findall(r'"([a-z]+/[a-z_0-9]+)"', Path(causes.__file__).read_text(encoding="utf-8"))
    assert len(read) > 20
    for name in {*read, *HEADLINE, *SHOWN, *FRONT}:
        assert described(name) is not None, name


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("reward/my_rule", "score"),  # one reward of several
        ("time/rollout_s", "s"),
        ("eval/dpo/exact_match", ""),  # one model's score
        ("eval/accuracy", "fraction"),
        ("polite/coverage", "fraction"),  # a weak labeler
        ("accuracy", "fraction"),  # the report's panel of train/ and eval/
        ("eval/loss_saved", "nats"),
    ],
)
def test_a_name_is_found_by_its_pattern_or_group(name: str, unit: str) -> None:
    found = described(name)
    assert found is not None
    assert found.unit == unit


def test_an_unknown_name_is_not_described() -> None:
    assert described("nonsense") is None
    assert described("kl/nonsense") is None


def test_every_meaning_is_one_line() -> None:
    for name, metric in metrics().items():
        assert 0 < len(metric.meaning) <= 90, name
        assert "\n" not in metric.meaning + metric.unit


def test_explain_prints_a_metric_and_guesses_at_a_misspelled_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    explain("kl/reference")
    assert capsys.readouterr().out.startswith("kl/reference (nats): ")
    with pytest.raises(DataError, match="did you mean 'kl/reference'"):
        explain("kl/refrence")
