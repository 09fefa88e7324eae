"""The ``tuning:`` block: what each method takes, and what is refused before anything is loaded."""

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from align.core.errors import RecipeError
from align.recipe.advice import warnings
from align.recipe.load import load_recipe, load_resolved
from align.recipe.schema import ClassifyStage, DpoStage, GrpoStage, RewardStage, SftStage
from align.recipe.schema.tuning import METHODS, known_rates

OFFLINE = {"init": "base", "data": [{"world": "sft"}]}
ONLINE = {
    "init": "base",
    "steps": 1,
    "prompts": [{"world": "prompts"}],
    "rewards": [{"kind": "regex", "pattern": "x"}],
}
STAGES = {
    "sft": (SftStage, OFFLINE),
    "reward": (RewardStage, OFFLINE),
    "dpo": (DpoStage, OFFLINE),
    "grpo": (GrpoStage, ONLINE),
    "classify": (ClassifyStage, OFFLINE),
}


def stage(kind: str, tuning: dict[str, Any], **more: Any) -> Any:
    model, common = STAGES[kind]
    text = json.dumps({"kind": kind, **common, "tuning": tuning, **more})
    return model.model_validate_json(text, strict=True)


@pytest.mark.parametrize(
    "tuning",
    [
        {"method": "full"},
        {"method": "lora"},
        {"method": "rslora", "rank": 64},
        {"method": "dora", "alpha": 8},
        {"method": "pissa", "rank": 2},
        {"method": "qlora"},
        {"method": "ia3"},
        {"method": "oft", "block_size": 4},
        {"method": "vera", "rank": 32},
        {"method": "bottleneck", "size": 8},
        {"method": "prefix", "hidden": 32},
        {"method": "prompt", "virtual_tokens": 4},
        {"method": "ptuning"},
        {"method": "loreft", "layers": [0, 3], "first": 2},
    ],
    ids=lambda t: t["method"],
)
def test_method_is_valid_in_every_training_stage(tuning):
    for kind in STAGES:
        assert stage(kind, tuning).tuning.method == tuning["method"]


@pytest.mark.parametrize(
    ("tuning", "key"),
    [
        ({"method": "full", "rank": 4}, "rank"),
        ({"method": "pissa", "alpha": 4}, "alpha"),
        ({"method": "ia3", "rank": 4}, "rank"),
        ({"method": "prompt", "hidden": 4}, "hidden"),
        ({"method": "bottleneck", "rank": 4}, "rank"),
    ],
)
def test_key_without_effect_on_the_method_is_unknown(tuning, key):
    with pytest.raises(ValidationError) as caught:
        stage("sft", tuning)
    (error,) = caught.value.errors()
    assert (error["type"], error["loc"][-1]) == ("extra_forbidden", key)


@pytest.mark.parametrize(
    ("kind", "tuning", "more", "said"),
    [
        ("sft", {"method": "head"}, {}, "which a policy stage does not add"),
        ("sft", {"method": "prefix"}, {"gradient_checkpointing": True}, "drops the cache"),
        ("dpo", {"method": "lora", "dropout": 0.1}, {}, "differ from its reference by chance"),
        ("grpo", {"method": "qlora", "dropout": 0.1}, {}, "differ from its reference by chance"),
        ("grpo", {"method": "bottleneck"}, {"sampling": {"engine": "vllm"}}, "cannot be merged"),
        ("grpo", {"method": "prompt"}, {"sampling": {"engine": "vllm"}}, "cannot be merged"),
        ("reward", {"method": "loreft", "last": 2}, {}, "does not know where a prompt ends"),
        ("sft", {"method": "loreft", "first": 0}, {}, "no token is edited"),
        ("sft", {"method": "loreft", "layers": []}, {}, "the list is empty: nothing would"),
        ("sft", {"method": "vera", "targets": []}, {}, "the list is empty: nothing would"),
        ("sft", {"method": "lora", "dropout": 1.0}, {}, "less than 1"),
    ],
)
def test_illegal_combination_is_refused_with_its_reason(kind, tuning, more, said):
    with pytest.raises(ValidationError, match=said):
        stage(kind, tuning, **more)


def test_head_trains_a_reward_stage():
    assert stage("reward", {"method": "head"}).tuning.method == "head"


RECIPE = """\
name: x
stages:
  base: {kind: base, path: some/model}
  sft:
    kind: sft
    init: base
    data: [{world: sft}]
    tuning: {method: lora, rank: 4}
"""


def mistakes(tmp_path, text: str) -> list[str]:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).split("\n")]


def test_key_of_earlier_versions_says_what_to_write_now(tmp_path):
    (line,) = mistakes(tmp_path, RECIPE.replace("tuning: {method: lora, rank: 4}", "lora: {}"))
    assert line == (
        "r.yaml:8:5: stages.sft.lora: unknown key; write 'tuning: {method: lora, rank: ...}' "
        "instead"
    )


def test_unknown_method_lists_the_methods(tmp_path):
    (line,) = mistakes(tmp_path, RECIPE.replace("method: lora", "method: loar"))
    assert line.startswith("r.yaml:8:22: stages.sft.tuning.method: found 'loar'; expected one of ")
    assert line.endswith("did you mean 'lora'?")
    (line,) = mistakes(tmp_path, RECIPE.replace("method: lora, ", ""))
    assert line.startswith("r.yaml:8:5: stages.sft.tuning.method: missing; expected one of full, ")


def test_unknown_key_of_a_method_lists_its_own(tmp_path):
    (line,) = mistakes(tmp_path, RECIPE.replace("rank: 4", "r: 4"))
    assert line == "r.yaml:8:28: stages.sft.tuning.r: unknown key; did you mean 'rank'?"


def test_extends_with_another_method_replaces_the_block(tmp_path):
    (tmp_path / "a.yaml").write_text(RECIPE)
    text = "extends: a.yaml\nstages:\n  sft: {tuning: {method: prompt}}\n"
    (tmp_path / "b.yaml").write_text(text)
    assert load_recipe(tmp_path / "b.yaml").stages["sft"].tuning.method == "prompt"


CHAIN = """\
name: x
stages:
  base: {kind: base, path: some/model}
  sft: {kind: sft, init: base, data: [{world: sft}], tuning: {method: prefix}}
  dpo: {kind: dpo, init: sft, data: [{world: preference}], tuning: {method: lora}}
"""


def test_stage_on_top_of_an_unmerged_adapter_is_refused_in_the_recipe(tmp_path):
    (line,) = mistakes(tmp_path, CHAIN)
    assert line.startswith(
        "r.yaml:5:26: stages.dpo.init: the model was tuned with prefix, whose adapter cannot be "
        "merged into its weights; only its virtual tokens are saved"
    )
    bottleneck = CHAIN.replace("prefix", "bottleneck")
    (line,) = mistakes(tmp_path, bottleneck)
    assert "repeat the same 'tuning' block" in line
    path = tmp_path / "r.yaml"
    path.write_text(bottleneck.replace("lora", "bottleneck"))
    assert load_recipe(path).stages["dpo"].tuning.method == "bottleneck"
    path.write_text(CHAIN.replace("prefix", "dora"))
    assert load_recipe(path).stages["sft"].tuning.method == "dora"


BOTTLENECK = """\
name: x
stages:
  base: {kind: base, path: some/model}
  sft: {kind: sft, init: base, data: [{world: sft}], tuning: {method: bottleneck}}
  scorer: {kind: reward, init: base, data: [{world: preference}], tuning: {method: prefix}}
"""
ONLINE_KEYS = json.dumps({k: v for k, v in ONLINE.items() if k != "init"})[1:-1]
SCORES = "[{kind: regex, pattern: x}]"


@pytest.mark.parametrize(
    ("later", "key", "said"),
    [
        ("{kind: merge, base: base, tuned: sft, alphas: [0.5]}", "tuned", "reads only weights"),
        ("{kind: merge, base: sft, tuned: base, alphas: [0.5]}", "base", "reads only weights"),
        (
            "{kind: merge, base: base, tuned: base, others: [sft], method: ties, alphas: [1]}",
            "others.0",
            "reads only weights",
        ),
        (
            "{kind: trl, trainer: KTO, init: sft, data: [{path: x}], rows: unpaired, steps: 1}",
            "init",
            "reads only weights",
        ),
        (
            f"{{kind: ppo, init: sft, tuning: {{method: bottleneck}}, {ONLINE_KEYS}}}",
            "init",
            "name a merged policy or a reward model in 'critic.init'",
        ),
        (
            f"{{kind: ppo, init: base, critic: {{init: scorer}}, {ONLINE_KEYS}}}",
            "critic.init",
            "reads only weights",
        ),
        (
            f"{{kind: evaluate, models: [base, sft], baseline: base, prompts: [{{path: x}}], "
            f"scores: {SCORES}, judge: {SCORES}, sampling: {{engine: vllm}}}}",
            "models.1",
            "write sampling.engine: hf",
        ),
    ],
)
def test_stage_that_cannot_hold_an_unmerged_adapter_is_refused_in_the_recipe(
    tmp_path, later, key, said
):
    lines = mistakes(tmp_path, f"{BOTTLENECK}  later: {later}\n")
    (line,) = [line for line in lines if f"stages.later.{key}: " in line]
    assert said in line


def test_ppo_goes_on_from_an_adapter_with_a_critic_of_its_own(tmp_path):
    path = tmp_path / "r.yaml"
    keys = f"init: sft, tuning: {{method: bottleneck}}, critic: {{init: base}}, {ONLINE_KEYS}"
    path.write_text(f"{BOTTLENECK}  later: {{kind: ppo, {keys}}}\n")
    assert load_recipe(path).stages["later"].critic.init == "base"


@pytest.mark.parametrize(
    ("tuning", "rate", "said"),
    [
        ("full", "2.0e-5", None),
        ("full", "1.0e-3", "0.001 is outside of 1e-05 to 5e-05"),
        ("lora", "2.0e-4", None),
        ("qlora", "1.0e-5", "1e-05 is outside of 0.0001 to 0.0003"),
        ("prompt", "3.0e-1", None),
        ("prompt", "1.0e-5", "1e-05 is outside of 0.001 to 0.3"),
        ("pissa", "2.0e-4", "0.0002 is outside of 1e-05 to 5e-05"),
        ("ia3", "3.0e-3", None),
    ],
)
def test_rate_outside_of_what_is_known_to_work_is_a_warning_with_its_source(
    tmp_path, tuning, rate, said
):
    path = tmp_path / "r.yaml"
    path.write_text(
        RECIPE.replace(
            "tuning: {method: lora, rank: 4}",
            f"tuning: {{method: {tuning}}}\n    optim: {{learning_rate: {rate}}}",
        )
    )
    lines = warnings(load_recipe(path))
    if said is None:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith(f"stages.sft.optim.learning_rate: {said}")
        assert "arXiv:" in line


def test_every_method_has_a_range_with_a_source():
    for family in ("supervised", "policy"):
        for method in METHODS:
            known = known_rates(family, method)
            assert known is not None
            assert 0.0 < known.low <= known.default < known.high < 1.0
            assert (
                "arXiv:" in known.source
                or "peft's comparison" in known.source
                or "TRL" in (known.source)
            )


POLICIES = """\
name: x
stages:
  base: {kind: base, path: some/model}
  sft: {kind: sft, init: base, data: [{world: sft}]}
  reward: {kind: reward, init: sft, data: [{world: preference}], tuning: {method: head}}
  dpo: {kind: dpo, init: sft, data: [{world: preference}], tuning: {method: lora}}
  kto: {kind: kto, init: sft, data: [{world: preference}], optim: {schedule: linear}}
  ppo:
    kind: ppo
    init: sft
    steps: 1
    prompts: [{world: prompts}]
    rewards: [{kind: scalar, model: reward}]
    tuning: {method: ia3}
  trl: {kind: trl, trainer: DPO, init: sft, data: [{world: preference}], rows: preference, steps: 1}
"""


def test_rate_that_is_left_out_is_the_default_of_method_and_stage(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(POLICIES)
    resolved = load_resolved(path)
    assert warnings(resolved.recipe) == []
    stages: Any = resolved.recipe.stages
    found = {name: stages[name].optim.learning_rate for name in stages if name != "base"}
    # Policy optimization: 2e-5 / 20, 2e-4 / 20, 5e-3 / 20; the critic and TRL keep one number.
    assert found == {
        "sft": 2e-5,
        "reward": 1e-3,
        "dpo": 1e-5,
        "kto": 1e-6,
        "ppo": 2.5e-4,
        "trl": 1e-5,
    }
    assert (stages["kto"].optim.schedule, stages["ppo"].critic.optim.learning_rate) == (
        "linear",
        1e-5,
    )
    assert resolved.origins["stages.dpo.optim.learning_rate"] == "default of lora in dpo"
    assert resolved.data["stages"]["dpo"]["optim"]["learning_rate"] == 1e-5
    given = load_recipe(
        path, ["stages.dpo.tuning.method=oft", "stages.sft.optim.learning_rate=0.1"]
    )
    changed: Any = given.stages
    assert (changed["dpo"].optim.learning_rate, changed["sft"].optim.learning_rate) == (5e-6, 0.1)


def test_mistake_beside_a_rate_that_is_left_out_keeps_its_place(tmp_path):
    wrongs = [
        ("optim: {schedule: linear}", "optim: {schedule: lineal}", "lineal", "optim.schedule"),
        ("optim: {schedule: linear}", "optim: lineal", "lineal", "optim"),
        ("{method: lora}", "{method: [lora]}", "[lora]", "tuning.method"),
    ]
    for old, new, value, key in wrongs:
        text = POLICIES.replace(old, new)
        (line,) = mistakes(tmp_path, text)
        number, words = next((i, x) for i, x in enumerate(text.split("\n"), 1) if value in x)
        name = words.strip().partition(":")[0]
        assert line.startswith(f"r.yaml:{number}:{words.index(value) + 1}: stages.{name}.{key}: ")


@pytest.mark.parametrize(
    ("name", "rate", "said"),
    [
        ("dpo", "1.0e-4", "0.0001 is outside of 5e-06 to 3e-05 for lora in dpo: 5e-6 in Zephyr's"),
        ("kto", "1.0e-5", "1e-05 is outside of 5e-07 to 5e-06 for full in kto: 5e-7 for Zephyr"),
        ("ppo", "1.0e-5", "1e-05 is outside of 5e-05 to 0.001 for ia3 in ppo: 1/20 to 1/10 of its"),
        ("reward", "1.0e-5", "1e-05 is outside of 0.0001 to 0.01 for head in reward: Adam's own"),
    ],
)
def test_policy_optimization_has_rates_of_its_own(tmp_path, name, rate, said):
    path = tmp_path / "r.yaml"
    path.write_text(POLICIES)
    changed = [f"stages.{name}.optim.learning_rate={rate}"]
    (line,) = warnings(load_recipe(path, changed))
    assert line.endswith("If it is meant, set optim.warn_rate: false")
    assert warnings(load_recipe(path, [*changed, f"stages.{name}.optim.warn_rate=false"])) == []
    assert line.startswith(f"stages.{name}.optim.learning_rate: {said}")


@pytest.mark.parametrize(
    ("tuning", "sampling", "said"),
    [
        ({"method": "lora"}, {"engine": "hf"}, "no effect with engine hf"),
        ({"method": "dora"}, {}, "needs an adapter that vLLM serves (lora or rslora)"),
        ({"method": "full"}, {}, "with full omit it"),
        ({"method": "rslora", "rank": 513}, {}, "ranks up to 512, found 513"),
    ],
)
def test_an_adapter_alone_is_pushed_only_where_vllm_serves_it(tuning, sampling, said):
    with pytest.raises(ValidationError, match=re.escape(said)):
        stage("grpo", tuning, sampling={"push": "adapter", **sampling})
    assert (
        stage("grpo", {"method": "lora"}, sampling={"push": "adapter"}).sampling.push == "adapter"
    )


def test_a_classifier_takes_a_head_and_no_end_of_a_prompt():
    assert stage("classify", {"method": "head"}).tuning.method == "head"
    with pytest.raises(ValidationError, match="a classify model does not know where a prompt ends"):
        stage("classify", {"method": "loreft", "last": 2})
    with pytest.raises(ValidationError, match="a classify stage replaces it by another head"):
        stage("classify", {"method": "full"}, keep={"ewc": {"coef": 1, "data": [{"world": "sft"}]}})


def test_small_models_take_any_rate(tmp_path):
    path = tmp_path / "r.yaml"
    build = "build: {vocab_size: 320}, data: [{world: corpus}], steps: 1"
    path.write_text(
        RECIPE.replace("path: some/model", build).replace(
            "rank: 4}", "rank: 4}\n    optim: {learning_rate: 0.01}"
        )
    )
    assert warnings(load_recipe(path)) == []
