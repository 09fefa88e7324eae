"""The parts of the report: ticks, numbers, panels and the picture of the chain."""

import json
from pathlib import Path

import pytest

from align.recipe.schema import Recipe
from align.report.answers import reward_and_length, side_by_side
from align.report.chain import depths, direct_edges
from align.report.charts import tick_label, ticks, unit_of
from align.report.classes import classifiers
from align.report.markup import duration, number
from align.report.merge import earlier, merges
from align.report.read import RunRecord, StageRecord
from align.report.sections import changes
from align.report.series import panels_of


def test_panels_share_train_and_eval_and_keep_gaps() -> None:
    rows = [
        {"step": 1, "train/loss": 2.0, "kl/reference": None},
        {"step": 1, "eval/loss": 3.0},
        {"step": 2, "train/loss": 1.5},
    ]
    panels = panels_of(rows)
    assert {t: [(line.label, line.points) for line in lines] for t, lines in panels.items()} == {
        "loss": [("train", [(1, 2.0), (2, 1.5)]), ("eval", [(1, 3.0)])],
        "kl/reference": [("kl/reference", [(1, None)])],
    }


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),  # a quarter is no round step; the next is 0.5
        (1.0, 40.0, [0, 10, 20, 30, 40]),
        (0.4, sum([0.4] * 3) / 3, [0.36, 0.38, 0.4, 0.42, 0.44]),  # equal but for rounding
        (5.0, 5.0, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks_are_round_and_span_the_data(low: float, high: float, expected: list[float]) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    if low < high:
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "all_ticks", "text"),
    [
        (0.5, [0, 0.5, 1.0], "0.5"),
        (2000.0, [0, 2000.0, 4000.0], "2k"),
        (30, [0, 10, 30], "30"),
        (0.0002, [0, 0.0001, 0.0002], "2e-04"),
        (0.15, [0.1, 0.15], "0.15"),
        (-0.0, [-1, 0.0], "0"),
    ],
)
def test_tick_label_has_the_decimals_its_step_needs(
    value: float, all_ticks: list[float], text: str
) -> None:
    assert tick_label(value, all_ticks) == text


def test_chain_columns_and_arrows_leave_out_what_a_longer_way_says() -> None:
    def stage(name: str, *needs: str) -> StageRecord:
        return StageRecord(name, "sft", "done", needs)

    stages = [
        stage("base"),
        stage("sft", "base"),
        stage("reward", "sft"),
        stage("ppo", "sft", "reward"),
        stage("evaluate", "base", "sft", "ppo"),
    ]
    assert depths(stages) == {"base": 0, "sft": 1, "reward": 2, "ppo": 3, "evaluate": 4}
    assert direct_edges(stages) == [
        ("base", "sft"),
        ("sft", "reward"),
        ("reward", "ppo"),
        ("ppo", "evaluate"),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.5, "0.5"), (12.0, "12"), (1234.4, "1,234"), (2.5e-5, "2.5e-05"), (0, "0")],
)
def test_number_is_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_duration_and_units_follow_the_names() -> None:
    assert [duration(s) for s in (4.25, 61.4, 7810)] == ["4.2 s", "1 min 1 s", "2 h 10 min"]
    names = ("loss", "kl/reference", "time/rollout_s", "tokens/per_s", "policy/clip_frac")
    assert [unit_of(n) for n in names] == ["nats", "nats", "s", "tokens/s", "fraction"]


def run_of(stage: StageRecord, summary: dict, folder: Path = Path("r")) -> RunRecord:
    recipe = Recipe.model_validate({"name": "r", "stages": {"b": {"kind": "base", "path": "x"}}})
    return RunRecord(folder, recipe, [stage], summary, [])


def test_changes_are_one_table_and_no_curves(tmp_path: Path) -> None:
    final = {
        "eval/loss": 0.5,
        "change/loss": -0.2,
        "change/loss_low": -0.3,
        "change/loss_high": -0.1,
    }
    lines = [{"step": 0, "eval/loss": 0.7}, {"step": 4, **final}]
    stage = StageRecord("sft", "sft", "done", (), {"metrics": final}, lines)
    shown = str(changes(run_of(stage, {}, tmp_path)))
    # Step 0, end, change and interval, in one row.
    cells = "".join(f"<td>{text}</td>" for text in ("0.7", "0.5", "-0.2", "[-0.3, -0.1]"))
    assert cells in shown
    (line,) = panels_of(lines)["loss"]
    assert (line.label, line.points) == ("eval", [(0, 0.7), (4, 0.5)])
    assert list(panels_of(lines)) == ["loss"]
    # A run from before step 0 was evaluated has no table.
    old = StageRecord("sft", "sft", "done", (), {"metrics": {"eval/loss": 0.5}}, lines[1:])
    assert changes(run_of(old, {}, tmp_path)) is None


def test_classifiers_show_the_matrix_and_the_surest_mistakes(tmp_path: Path) -> None:
    # Of four rows of "<a>" one is taken as b: recall 3/4; of the two of b none is right.
    each = {
        "<a>": {"precision": 0.6, "recall": 0.75, "f1": 2 * 0.45 / 1.35, "support": 4},
        "b": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2},
    }
    held = {
        "accuracy": [0.5, 0.2, 0.8],
        "macro_f1": [1 / 3, 0.1, 0.6],
        "classes": each,
        "confusion": [[3, 1], [2, 0]],
    }
    rows = [("x:1", "<a>", "b", 0.55), ("x:2", "b", "<a>", 0.9), ("x:3", "<a>", "<a>", 0.99)]
    (tmp_path / "c").mkdir()
    with (tmp_path / "c" / "predictions.jsonl").open("w") as file:
        for source, label, taken, p in rows:
            line = {"source": source, "label": label, "predicted": taken, "probs": {taken: p}}
            file.write(json.dumps(line) + "\n")
    manifest = {"heldout": held, "metrics": {"tuning/trained_params": 1234.0}}
    stage = StageRecord("c", "classify", "done", (), manifest)
    page = str(classifiers(run_of(stage, {}, tmp_path)))
    for part in (
        "0.500",
        "[0.200, 0.800]",
        "1,234",
        "0.750",
        "0.667",
        "predicted &lt;a&gt;",
        'mix8">3<',  # 3 of 4, in steps of a tenth
        "2 of 3 rows are misclassified",
    ):
        assert part in page, part
    assert "x:3" not in page
    assert page.index("x:2") < page.index("x:1")
    assert classifiers(run_of(StageRecord("c", "classify", "done", ()), {}, tmp_path)) is None


def test_merge_section_shows_the_curve_and_the_chosen_alpha() -> None:
    def point(alpha: float, shifted: float) -> dict:
        ends = {"prompts_gain": [0.0, -0.1, 0.1], "shifted_gain": [None, None, None]}
        return {"alpha": alpha, "prompts": [0.5, 0.4, 0.6], "shifted": [shifted] * 3, **ends}

    manifest = {"alpha": 0.25, "curve": [point(0.25, 0.875), point(1.0, 0.125)]}
    page = str(merges(run_of(StageRecord("m", "merge", "done", (), manifest), {})))
    assert "<b>0.25 chosen</b>" in page
    assert "1 chosen" not in page
    assert "0.875" in page
    assert "alpha</text>" in page  # the axis is alpha, not the step
    assert (
        merges(run_of(StageRecord("m", "merge", "done", (), {"alpha": 0.5, "curve": []}), {}))
        is None
    )


def test_earlier_evaluations_show_what_an_old_task_has_lost() -> None:
    lost = {"exact_match": {"difference": [-0.5, -0.625, -0.375], "null": 0.0}}
    own = {"baseline": "old", "contrasts": {"plain": lost}}
    summary = {"earlier": {"evaluate_old": {"tasks": {"heldout": own}}, "x": {"tasks": {}}}}
    stage = StageRecord("b", "base", "done", ())
    page = str(earlier(run_of(stage, summary)))
    assert "evaluate_old" in page
    assert "plain - old: exact_match" in page
    assert "-0.500" in page
    assert "[-0.625, -0.375]" in page
    assert ">x<" not in page
    assert earlier(run_of(stage, {})) is None


def test_answers_of_two_tasks_are_two_prompts_and_a_label_names_the_baseline() -> None:
    spec = {
        "kind": "evaluate",
        "models": ["/old", "/new"],
        "labels": {"/old": "old", "/new": "new"},
        "baseline": "/old",
        "prompts": [{"path": "x.jsonl"}],
        "scores": [{"kind": "exact_match"}],
        "judge": [{"kind": "exact_match"}],
    }
    recipe = Recipe.model_validate({"name": "r", "stages": {"b": spec}})
    samples = [
        {
            "task": task,
            "model": model,
            "prompt_index": 0,
            "prompt": f"{task}?",
            "completion": f"{task} {model}",
            "length": 2,
            "score": 1.0,
        }
        for task in ("heldout", "sums")
        for model in ("old", "new")
    ]
    stage = StageRecord("b", "evaluate", "done", (), samples=samples)
    run = RunRecord(Path("r"), recipe, [stage], {}, [])
    page = str(side_by_side(run))
    assert "2 of 2 held-out prompts" in page
    assert page.count("<article ") == 2
    for task in ("heldout", "sums"):
        assert f"{task}?" in page
        assert f"{task} <mark>new</mark>" in page
    assert "differ from old are" in page
    assert "<b>new, sums</b>" in str(reward_and_length(run))
    assert "<b>new</b>" in str(reward_and_length(run))
