"""Task files: each is valid, what they lack is said, and a question becomes a recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.cli.eval_recipe import Question, find_checkpoint, label_all, question_recipe
from align.core.errors import AlignError, RecipeError
from align.recipe.load import load_recipe, shipped_tasks

RECIPE = """\
name: toy
stages:
  base: {{kind: base, build: {{vocab_size: 64}}, data: [{{world: corpus}}], steps: 1}}
  evaluate:
    kind: evaluate
    models: [base]
    baseline: base
    {rest}
"""
ENDPOINT = "pairwise: {endpoint: {url: 'http://127.0.0.1:1/v1', model: m}}"


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN_REAL_DATA", "/nowhere")


def evaluate_spec(*rest: str):
    Path("r.yaml").write_text(RECIPE.format(rest="\n    ".join(rest)))
    return load_recipe("r.yaml").stages["evaluate"]


@pytest.mark.parametrize("name", shipped_tasks())
def test_shipped_task_is_valid_and_has_the_name_of_its_file(name: str):
    rest = [f"tasks: [{name}]", *([ENDPOINT] if name == "instructions" else [])]
    (task,) = evaluate_spec(*rest).tasks
    assert task.name == name
    assert task.description
    assert task.reported


def test_task_by_path_takes_its_data_from_its_own_folder():
    Path("mine").mkdir()
    Path("mine/quiz.yaml").write_text(
        "name: quiz\nprompts: [{path: ./quiz.jsonl}]\ngrader: [{kind: exact_match}]\n"
    )
    (task,) = evaluate_spec("tasks: [mine/quiz.yaml]").tasks
    assert task.prompts[0].path == "mine/quiz.jsonl"
    assert task.reported[:3] == ["win_rate", "length_controlled_win_rate", "exact_match"]


def test_mistake_in_a_task_file_is_told_with_its_line():
    Path("quiz.yaml").write_text("name: quiz\nprompts: [{path: q.jsonl}]\nsample: 2\n")
    with pytest.raises(RecipeError) as told:
        evaluate_spec("tasks: [quiz.yaml]")
    assert "quiz.yaml:3:1: stages.evaluate.tasks.0.sample: unknown key" in str(told.value)
    assert "did you mean 'samples'?" in str(told.value)


def test_unknown_task_is_told_where_it_is_named():
    with pytest.raises(RecipeError, match=r"r.yaml:8:13: .*no task 'wrld'.*did you mean 'world'"):
        evaluate_spec("tasks: [wrld]")


def test_setting_an_unset_variable_is_told_in_the_task_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ALIGN_REAL_DATA")
    with pytest.raises(RecipeError, match=r"gsm8k.yaml:\d+:\d+: .*ALIGN_REAL_DATA is not set"):
        evaluate_spec("tasks: [gsm8k]")


WORLD = "name: t, prompts: [{world: prompts, rows: 9}]"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("reward_models: []", "nothing to evaluate"),
        ("scores: [{kind: math}]", "belong together"),
        ("tasks: [{WORLD}]", "needs a judge"),
        ("tasks: [world, world]", "same name"),
        (
            "tasks: [{WORLD, grader: [{kind: length, target: 1, limit: 2}]}]",
            "length: the name of a metric",
        ),
        ("tasks: [{WORLD, grader: [{kind: math}], metrics: [maths]}]", "no metric 'maths'"),
        ("tasks: [{WORLD, grader: [{kind: math}], metrics: [pass@2]}]", "samples: 2"),
        ("tasks: [{WORLD, grader: [{kind: math}], metrics: [kl]}]", "temperature"),
        ("tasks: [{WORLD, grader: [{kind: math}], metrics: [perplexity]}]", "each other"),
        ("tasks: [world]\n    labels: {sft: x}", "labels"),
    ],
)
def test_evaluate_stage_refuses_what_cannot_be_asked(rest: str, message: str):
    with pytest.raises(RecipeError, match=message):
        evaluate_spec(rest.replace("WORLD", WORLD))


def artifact(folder: str, kind: str = "policy") -> Path:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "manifest.json").write_text(json.dumps({"kind": kind}))
    return Path(folder)


def written(recipe: dict) -> Path:
    Path("q.yaml").write_text(yaml.safe_dump({"name": "q", **recipe}, sort_keys=False))
    return Path("q.yaml")


def test_question_about_checkpoints_becomes_a_valid_recipe():
    for stage in ("sft", "dpo"):
        artifact(f"runs/a/{stage}")
    artifact("runs/a/reward", "reward_model")
    Path("hf/model").mkdir(parents=True)
    (Path("hf/model") / "config.json").write_text("{}")
    plain = question_recipe(
        Question(
            ["a/dpo", "hf/model"],
            ["world"],
            baseline="a/sft",
            samples=5,
            limit=7,
            judge="a/reward",
            tokenizer={"chat_template": "plain"},
        ),
        Path("runs"),
    )
    recipe = load_recipe(written(plain))
    spec = recipe.stages["evaluate"]
    assert spec.models == ["runs/a/sft", "runs/a/dpo", "model"]
    assert [spec.label(m) for m in spec.models] == ["sft", "dpo", "model"]
    assert spec.label(spec.baseline) == "sft"
    assert (recipe.stages["model"].kind, recipe.stages["model"].path) == ("base", "hf/model")
    (task,) = spec.tasks
    assert (task.samples, task.prompts[0].rows, task.judge[0].model) == (5, 7, "runs/a/reward")


def test_checkpoints_of_two_runs_keep_apart():
    places = [artifact("runs/a/sft"), artifact("runs/b/sft")]
    assert list(label_all(places).values()) == ["a-sft", "b-sft"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no such model"), ("a/reward", "is a reward_model")],
)
def test_what_is_no_policy_is_refused(name: str, message: str):
    artifact("runs/a/reward", "reward_model")
    with pytest.raises(AlignError, match=message):
        find_checkpoint(name, Path("runs"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "http://x/v1"}, "no model given"),
        ({"judge_model": "m"}, "no effect"),
        ({"judge": "a/sft"}, "expected 'rule'"),
        ({"tasks": ["lm_eval:arc"]}, r"python -m venv .* --lm-eval"),
        ({"harness": "py"}, "no effect"),
        ({"tasks": ["wrld"]}, "did you mean 'world'"),
    ],
)
def test_options_that_do_not_fit_are_told(changes: dict, message: str):
    artifact("runs/a/sft")
    given = {"checkpoints": ["a/sft"], "tasks": ["world"], **changes}
    with pytest.raises(RecipeError, match=message):
        question_recipe(Question(**given), Path("runs"))


def test_command_tells_a_missing_checkpoint_with_exit_code_2():
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", "align.cli", "eval", "runs/none/sft"],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert done.returncode == 2
    assert "runs/none/sft: no such model" in done.stderr
    assert "Traceback" not in done.stderr
