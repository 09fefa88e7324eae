"""The cards of reward models in the report: every number stands there, pictures have axes."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from align.cli.reward_cards import card_lines, scorers_among
from align.core.artifacts import write_json_atomic, write_manifest
from align.core.errors import RecipeError
from align.core.log import CARDS_FILE
from align.evaluation.card import ScoredPair, ScoredSet, best_of_n, pair_card, set_card
from align.recipe.schema import Recipe
from align.report import build_cards
from align.report.card import reward_cards
from align.report.charts import STANDALONE, Series, picture
from align.report.read import RunRecord, StageRecord


def card() -> dict:
    pairs = [
        ScoredPair("sums" if i % 2 else "<b>", str(i), float(i % 5), 1.0, 5 + 10 * (i % 3), 15)
        for i in range(40)
    ]
    sets = [ScoredSet("sums", str(i), (float(i % 3),), (1.0, 0.0, 0.5)) for i in range(9)]
    scores = {str(k): [float((k + i) % 4) for i in range(4)] for k in range(5)}
    curve = best_of_n(scores, {k: v[::-1] for k, v in scores.items()}, seed=0)
    return pair_card(pairs, seed=0) | set_card(sets, seed=0) | {"best_of_n": curve}


def run_with(folder: Path, cards: dict | None) -> RunRecord:
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "stages": {"base": {"kind": "base", "path": "x"}},
        }
    )
    stage = StageRecord("evaluate", "evaluate", "done", ())
    if cards is not None:
        (folder / "evaluate").mkdir()
        write_json_atomic(folder / "evaluate" / CARDS_FILE, cards)
    return RunRecord(folder, recipe, [stage], {}, [])


def test_card_shows_its_numbers_and_three_pictures(tmp_path: Path):
    found = card()
    html = str(reward_cards(run_with(tmp_path, {"scorer": found})))
    root = ET.fromstring(html)
    text = " ".join(root.itertext())
    for name in ("pair_accuracy", "ece", "log_loss", "best_of_set_accuracy"):
        assert f"{found[name][0]:.3f}" in text
    assert "40 pairs of 40 prompts" in text
    assert "<b>" in text  # a source's name is text, not markup
    pictures = root.findall(".//svg")
    assert len(pictures) == 3
    for svg in pictures:
        words = [t.text for t in svg.findall(".//text")]
        assert "accuracy" in words or "gold score" in words


def test_run_without_reward_models_has_no_section(tmp_path: Path):
    assert reward_cards(run_with(tmp_path, None)) is None


def test_picture_places_points_by_their_axes():
    svg = picture(
        "t", [Series("a", [(0.0, 0.0), (10.0, 4.0)])], x_label="x", y_label="y", style=STANDALONE
    )
    root = ET.fromstring(str(svg))
    space = "{http://www.w3.org/2000/svg}"
    low, high = (
        (float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{space}circle")
    )
    assert low[0] < high[0]
    assert low[1] > high[1]  # y grows upwards


def test_cards_have_a_page_of_their_own(tmp_path: Path):
    found = card()
    html = build_cards(tmp_path / "card.html", {"runs/a/reward": found}).read_text()
    assert "runs/a/reward" in html
    assert f"{found['pair_accuracy'][0]:.3f}" in html
    lines = card_lines({"a": {**found, "num_pairs_too_long": 3}})
    assert lines[0] == "a: 40 pairs, 3 too long"
    assert any(line.startswith("  pair accuracy: ") for line in lines)


def test_reward_models_are_told_from_policies(tmp_path: Path):
    for name, kind in (("rm", "reward_model"), ("other", "reward_model"), ("sft", "policy")):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, {"kind": kind, "spec_hash": "x", "data": []})
    assert scorers_among(["rm", str(tmp_path / "other")], tmp_path) == [
        tmp_path / "rm",
        tmp_path / "other",
    ]
    assert scorers_among(["sft"], tmp_path) == []
    with pytest.raises(RecipeError, match="once for each"):
        scorers_among(["rm", "sft"], tmp_path)
