"""The three forms in which a command names a model, and a hub id read from a cache."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import align
from align.api.given import base_stage, rewards
from align.api.running import load_recipe
from align.cli import cli
from align.core.artifacts import find_model, write_manifest
from align.core.errors import ArtifactError, RecipeError
from align.models.loading import model_folder
from align.recipe.schema import references
from align.recipe.schema.evaluate import EvaluateStage
from align.stages import base as stages
from align.stages.tools import calibrate, chat, reward_cards, serve

DATA = [{"world": "sft"}]
ROWS = [{"prompt": "a", "completion": "b"}]


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for stage, kind in (("sft", "policy"), ("reward", "reward_model")):
        folder = Path("runs/quick", stage)
        (folder / "model").mkdir(parents=True)
        (folder / "model/config.json").write_text("{}")
        write_manifest(folder, {"kind": kind, "stage": stage, "spec_hash": "0"})
    Path("saved").mkdir()
    Path("saved/config.json").write_text("{}")


def test_the_three_forms():
    assert find_model("quick/sft") == Path("runs/quick/sft")
    assert find_model("runs/quick/sft") == Path("runs/quick/sft")
    assert find_model("saved") == Path("saved")
    assert find_model("sft", Path("runs/quick")) == Path("runs/quick/sft")
    assert str(find_model("Qwen/Qwen3-0.6B")) == "Qwen/Qwen3-0.6B"
    assert model_folder(Path("runs/quick/sft"), "policy") == Path("runs/quick/sft/model")
    assert model_folder(Path("saved"), "policy") == Path("saved")


def test_an_artifact_of_another_kind_and_a_missing_stage_are_refused():
    with pytest.raises(ArtifactError, match="'reward_model', expected a 'policy'"):
        model_folder(Path("runs/quick/reward"), "policy")
    with pytest.raises(ArtifactError, match="no such finished stage; finished are reward, sft"):
        find_model("quick/dpo")
    for name in ("nowhere", "runs/quick2", "a/b/c", "-a/b"):
        with pytest.raises(ArtifactError, match="no such model; expected RUN/STAGE"):
            find_model(name)


def test_a_missing_path_is_no_stage_of_a_run():
    for name in ("/no/such/model", "./saved2", "../saved", "./org/name", "~/model"):
        with pytest.raises(ArtifactError, match=f"^{name}: no such model; expected RUN/STAGE"):
            find_model(name)
    Path("rows").mkdir()
    with pytest.raises(ArtifactError, match=r"rows: no manifest\.json and no config\.json in it"):
        find_model(str(Path("rows").resolve()))
    with pytest.raises(ArtifactError, match="runs/quick has no such finished stage; finished are"):
        find_model("runs/quick/dpo")


def test_a_hub_id_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    # The layout of the hub client's cache: refs/<branch> names the folder of a commit.
    commit, cache = "0" * 40, tmp_path / "cache"
    snapshot = cache / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (cache / "models--org--name/refs").mkdir()
    (cache / "models--org--name/refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(find_model("org/name"), "policy") == snapshot
    with pytest.raises(ArtifactError, match="org/other: no such folder, and it cannot be loaded"):
        model_folder(find_model("org/other"), "policy")


def test_a_recipe_and_python_name_a_stage_of_a_run_as_a_command_does():
    recipe = {
        "name": "next",
        "stages": {
            "dpo": {"kind": "dpo", "init": "quick/sft", "data": [{"world": "preference"}]},
            "ppo": {
                "kind": "ppo",
                "init": "dpo",
                "prompts": [{"world": "prompts", "rows": 8}],
                "rewards": [{"kind": "scalar", "model": "quick/reward"}],
                "critic": {"init": "quick/reward"},
                "steps": 1,
            },
            "compared": {
                "kind": "evaluate",
                "models": ["ppo", "quick/sft"],
                "labels": {"quick/sft": "before"},
                "baseline": "quick/sft",
                "tasks": ["world"],
            },
        },
    }
    stages = load_recipe(recipe).stages
    assert references(stages["dpo"])["init"] == "runs/quick/sft"
    ppo = references(stages["ppo"])
    assert (ppo["init"], ppo["rewards.0.model"]) == ("dpo", "runs/quick/reward")
    assert ppo["critic.init"] == "runs/quick/reward"
    compared = stages["compared"]
    assert isinstance(compared, EvaluateStage)
    assert (compared.models, compared.baseline) == (["ppo", "runs/quick/sft"], "runs/quick/sft")
    assert compared.labels == {"runs/quick/sft": "before"}
    # A stage that is not finished, and a reward model where a policy is wanted, are named.
    recipe["stages"]["dpo"]["init"] = "quick/dpo"
    with pytest.raises(
        RecipeError, match=r"stages\.dpo\.init: 'quick/dpo' is neither a stage nor a folder"
    ):
        load_recipe(recipe)
    # A path is never looked up below the runs, as in a command.
    for name in ("../saved/sft", "./quick/sft", "quick/../quick/sft"):
        with pytest.raises(ArtifactError, match="no such model"):
            find_model(name)
        recipe["stages"]["dpo"]["init"] = name
        with pytest.raises(RecipeError, match=f"'{name}' is neither a stage nor a folder"):
            load_recipe(recipe)
    recipe["stages"]["dpo"]["init"] = "quick/reward"
    with pytest.raises(RecipeError, match="'runs/quick/reward' is a reward_model; expected"):
        load_recipe(recipe)
    # The functions of Python: the model, and a reward.
    assert base_stage("quick/sft", None) == ({}, "runs/quick/sft")
    assert base_stage("saved", None) == ({"kind": "base", "path": "saved"}, "base")
    assert base_stage("org/name", None) == ({"kind": "base", "path": "org/name"}, "base")
    assert base_stage("gpt2", None) == ({"kind": "base", "path": "gpt2"}, "base")
    assert rewards(["quick/reward", "math"]) == [
        {"kind": "scalar", "model": "runs/quick/reward"},
        {"kind": "math"},
    ]
    with pytest.raises(ArtifactError, match="no such finished stage; finished are reward, sft"):
        base_stage("quick/dpo", None)
    with pytest.raises(ArtifactError, match="no such finished stage; finished are reward, sft"):
        rewards("quick/rm")


def test_a_recipe_names_a_stage_below_the_folder_of_the_option_runs():
    Path("runs").rename("elsewhere")
    Path("next.yaml").write_text(
        "name: next\nstages:\n  dpo: {kind: dpo, init: quick/sft, data: [{world: preference}]}\n"
    )
    runner = CliRunner()
    for words in (["check"], ["show"], ["run", "--dry-run"]):
        given = [words[0], "next.yaml", *words[1:]]
        with pytest.raises(RecipeError, match="'quick/sft' is neither a stage nor a folder"):
            runner.invoke(cli, given, catch_exceptions=False)
        done = runner.invoke(cli, [*given, "--runs", "elsewhere"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert (
        "init: elsewhere/quick/sft"
        in runner.invoke(cli, ["show", "next.yaml", "--runs", "elsewhere"]).output
    )


def test_python_and_init_look_below_the_folder_of_the_runs_that_is_given():
    Path("runs").rename("elsewhere")
    runs = Path("elsewhere")
    assert base_stage("quick/sft", None, runs) == ({}, "elsewhere/quick/sft")
    assert rewards("quick/reward", runs) == [{"kind": "scalar", "model": "elsewhere/quick/reward"}]
    recipe = {"name": "n", "stages": {"s": {"kind": "sft", "init": "quick/sft", "data": DATA}}}
    assert references(load_recipe(recipe, runs=runs).stages["s"])["init"] == "elsewhere/quick/sft"
    with pytest.raises(RecipeError, match="'quick/sft' is neither a stage nor a folder"):
        load_recipe(recipe)
    # The functions fail for the unknown key only after they have found the model.
    with pytest.raises(RecipeError, match=r"^align\.sft: stepz: unknown key"):
        align.sft(model="quick/sft", data=ROWS, runs=runs, stepz=1)
    with pytest.raises(ArtifactError, match="no such model; expected RUN/STAGE"):
        align.sft(model="quick/sft/", data=ROWS, stepz=1)
    given = {"rewards": "quick/reward", "steps": 1, "stepz": 1}
    with pytest.raises(RecipeError, match=r"^align\.grpo: stepz: unknown key"):
        align.grpo(model="quick/sft", data=ROWS, runs=runs, **given)
    # init proposes stages that start from it, without a base stage.
    Path("x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["init", "--model", "quick/sft", "--data", "x.jsonl", "--runs", "elsewhere"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    stages = load_recipe("my-run.yaml", runs=runs).stages
    assert list(stages) == ["sft"]
    assert references(stages["sft"])["init"] == "elsewhere/quick/sft"


def test_a_launch_script_looks_below_the_folder_of_the_option_runs(monkeypatch):
    Path("runs").rename("elsewhere")
    Path("next.yaml").write_text(
        "name: next\nstages:\n  dpo: {kind: dpo, init: quick/sft, data: [{world: preference}]}\n"
    )
    began: list[stages.StageContext] = []

    def begin(context: stages.StageContext, *rest: object, **options: object) -> None:
        began.append(context)  # None: the stage counts as finished

    monkeypatch.setattr(stages, "_begin", begin)
    for words, folder in (([], "elsewhere/next"), (["--run-dir", "there"], "there")):
        given = ["--recipe", "next.yaml", "--runs", "elsewhere", *words]
        monkeypatch.setattr(sys, "argv", ["dpo.py", "dpo", *given])
        assert stages.run_stage("dpo", stages._arguments()) == 0
        assert began[-1].run_dir == Path(folder)
        assert began[-1].folder_of("elsewhere/quick/sft") == Path("elsewhere/quick/sft")
    monkeypatch.setattr(sys, "argv", ["dpo.py", "dpo", "--recipe", "next.yaml"])
    with pytest.raises(RecipeError, match="'quick/sft' is neither a stage nor a folder"):
        stages.run_stage("dpo", stages._arguments())


def test_the_scripts_of_a_model_look_below_the_folder_of_the_runs(monkeypatch, capsys, caplog):
    Path("runs").rename("elsewhere")
    Path("p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for module, words in (
        (chat, ["quick/reward"]),
        (serve, ["quick/sft"]),
        (reward_cards, ["quick/sft", "--out", "o.json"]),
        (calibrate, ["quick/sft", "--pairs", "p.jsonl", "--out", "o.json"]),
    ):
        said = []
        for more in ([], ["--runs", "elsewhere"]):
            monkeypatch.setattr(sys, "argv", ["script", *words, *more])
            with pytest.raises(SystemExit) as ended:
                module.main()
            assert ended.value.code == 2
            said.append(capsys.readouterr().err + caplog.text)
            caplog.clear()
        # Found the second time: what is in the folder is of another kind than the script needs.
        assert ["the artifact is a" in text for text in said] == [False, True], module
