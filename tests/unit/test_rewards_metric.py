"""A metric of the evaluate library as a reward: from a local file, without a network."""

import sys
from pathlib import Path

import pytest

from reward_models import build_reward

OVERLAP = """\
import datasets
import evaluate


class Overlap(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references, lower=False):
        found = []
        for mine, other in zip(predictions, references):
            if lower:
                mine, other = mine.lower(), other.lower()
            found.append(len({*mine.split()} & {*other.split()}) / len({*other.split()}))
        return {"overlap": sum(found) / len(found), "rows": len(found)}
"""


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("metrics") / "overlap"
    folder.mkdir()
    (folder / "overlap.py").write_text(OVERLAP, encoding="utf-8")
    return str(folder)


def test_each_response_is_scored_against_its_own_reference(metric: str):
    spec = {"kind": "metric", "path": metric, "key": "overlap"}
    prompts, texts = ["q"] * 3, ["the cat sat", "A dog", "nothing"]
    references = ["the cat", "a dog barks", None]
    # By hand: {the, cat} of 2; "A" is not "a", so {dog} of 3; a missing reference is no score.
    found = build_reward(spec)
    scores = found(prompts=prompts, completions=texts, reference=references)
    assert scores == [1.0, pytest.approx(1 / 3), None]
    assert dict(found.invalid) == {"column 'reference' is empty": 1}
    # The metric's own arguments arrive, and so does the name of another column.
    lower = build_reward({**spec, "column": "gold", "args": {"lower": True}})
    assert lower(prompts=["q"], completions=["A dog"], gold=["a dog barks"]) == [
        pytest.approx(2 / 3)
    ]


def test_a_result_of_several_numbers_needs_its_key(metric: str):
    found = build_reward({"kind": "metric", "path": metric})
    assert found(prompts=["q"], completions=["a"], reference=["a"]) == [None]
    (reason,) = found.invalid
    assert reason == "the metric's results are overlap, rows; set 'key' to one of them"


def test_a_metric_that_is_not_there_is_one_clear_line(tmp_path: Path):
    place = str(tmp_path / "missing.py")
    with pytest.raises(ValueError, match=r"^reward 'missing': the metric '.*' cannot be loaded"):
        build_reward({"kind": "metric", "path": place})


def test_an_installation_without_evaluate_says_what_to_install(
    metric: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ValueError, match=r"pip install 'align-suite\[eval\]'$"):
        build_reward({"kind": "metric", "path": metric})
