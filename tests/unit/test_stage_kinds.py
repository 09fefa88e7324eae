"""Every list of kinds held against the one that counts: stages, tunings, rewards and formats."""

import ast
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest

from align.online.advantages import ESTIMATORS
from align.recipe.algorithms import ALGORITHMS
from align.recipe.schema import STAGES, DataSpec, Spec, TrainingStage, ref_of, references
from align.recipe.schema.formats import ALIASES, FORMATS
from align.recipe.schema.tuning import METHODS, known_rates

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {"calibrate", "card", "chat", "check", "serve_reward"}
"""Launch scripts that start no stage."""
DATA = {"data.stage": ("data",)}
TRAINED = {"init": ("policy",), "keep.ewc.data.stage": ("data",)}
OFFLINE = {**TRAINED, **DATA, "heldout.stage": ("data",)}
REWARD = ("reward_model",)
ONLINE = {
    **TRAINED,
    "prompts.stage": ("data",),
    "rewards.model": REWARD,
    "watch.prompts.stage": ("data",),
    "watch.gold.model": REWARD,
}
HEAD = {"init": ("policy", "encoder")}
# Kind to what it writes and what its keys may name, by hand; list places are left out.
EXPECTED: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "base": ("policy", DATA),
    "encoder": ("encoder", {}),
    "sft": ("policy", OFFLINE),
    "classify": ("classifier", OFFLINE | HEAD),
    "reward": ("reward_model", OFFLINE | HEAD),
    "dpo": ("policy", OFFLINE),
    "kto": ("policy", OFFLINE),
    "ppo": ("policy", ONLINE | {"critic.init": ("policy", "reward_model")}),
    "grpo": ("policy", ONLINE),
    "trl": (
        "policy",
        {
            **DATA,
            "init": ("policy",),
            "teacher": ("policy",),
            "heldout.stage": ("data",),
            "rewards.model": REWARD,
        },
    ),
    "self_instruct": ("data", {"init": ("policy",), "seeds.stage": ("data",)}),
    "curate": ("data", DATA | {"quality.model": REWARD}),
    "weak_label": ("data", DATA | {"functions.by.model": REWARD}),
    "evaluate": (
        "evaluation",
        {
            "models": ("policy",),
            "reference": ("policy",),
            "reward_models": REWARD,
            **{f"{part}prompts.stage": ("data",) for part in ("", "tasks.")},
            "tasks.answers.stage": ("data",),
            "pairs.stage": ("data",),
            "sets.stage": ("data",),
            **{f"{part}.model": REWARD for part in ("scores", "judge")},
            **{f"tasks.{part}.model": REWARD for part in ("grader", "judge")},
        },
    ),
    "merge": (
        "policy",
        {
            **dict.fromkeys(("base", "tuned", "others"), ("policy",)),
            "prompts.stage": ("data",),
            "shifted.stage": ("data",),
            "scores.model": REWARD,
        },
    ),
}


def specs_in(annotation: Any) -> set[type[Spec]]:
    """Find the parts of the schema that a type is made of."""
    if isinstance(annotation, type) and "variants" in annotation.__dict__:
        return set(annotation.variants.values())
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return {annotation}
    return {spec for inner in get_args(annotation) for spec in specs_in(inner)}


def marked(kind: type[Spec], before: str = "", above: tuple[type, ...] = ()) -> dict[str, Any]:
    found = {}
    for name, field in kind.model_fields.items():
        mark = ref_of(field)
        if mark is not None:
            found[before + name] = mark.kinds
        for part in specs_in(field.annotation) - {*above, kind}:
            found |= marked(part, f"{before}{name}.", (*above, kind))
    return found


@pytest.mark.parametrize("kind", STAGES)
def test_what_a_stage_writes_and_names_is_what_stands_here(kind: str):
    produces, named = EXPECTED[kind]
    assert STAGES[kind].produces == produces
    found = marked(STAGES[kind])
    # The members of an ensemble are rewards again, and name what any other does.
    assert {k: v for k, v in found.items() if ".members." not in k} == named
    assert all(v == REWARD for k, v in found.items() if ".members." in k)


def test_every_reference_can_be_met():
    made = {stage.produces for stage in STAGES.values()}
    assert {
        kind for stage in STAGES.values() for kinds in marked(stage).values() for kind in kinds
    } <= made


def test_references_walks_lists_blocks_and_ensembles():
    scorer = {"kind": "scalar", "model": "rm"}
    evaluate = STAGES["evaluate"].model_validate_json(
        json.dumps(
            {
                "kind": "evaluate",
                "models": ["a", "b"],
                "baseline": "a",
                "prompts": [{"path": "p"}, {"stage": "made"}],
                "scores": [{"kind": "ensemble", "members": [scorer, scorer | {"name": "x"}]}],
                "judge": [scorer],
            }
        )
    )
    assert references(evaluate) == {
        "models.0": "a",
        "models.1": "b",
        "prompts.1.stage": "made",
        "scores.0.members.0.model": "rm",
        "scores.0.members.1.model": "rm",
        "judge.0.model": "rm",
    }


@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_has_a_module_that_prepares_it(kind: str):
    stage = STAGES[kind]
    assert callable(import_module(stage.module).prepare)


def test_every_stage_has_a_launch_script_that_starts_it():
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("launch/*.py")}
    assert scripts.keys() == STAGES.keys() | TOOLS
    for kind in STAGES:
        calls = [n for n in ast.walk(ast.parse(scripts[kind])) if isinstance(n, ast.Call)]
        assert [ast.unparse(call) for call in calls] == [f"become('align.stages', '{kind}')"]
        assert f"launch/{kind}.py --recipe R" in scripts[kind]


@pytest.mark.parametrize("kind", [k for k, s in STAGES.items() if issubclass(s, TrainingStage)])
def test_every_training_stage_has_rates_for_every_method(kind: str):
    stage: Any = STAGES[kind]
    assert stage.family == ("supervised" if kind in ("sft", "reward", "classify") else "policy")
    assert all(known_rates(stage.family, method) is not None for method in METHODS)
    assert bool(stage.heldout_metrics) == (kind not in ("ppo", "grpo"))


def test_every_kind_is_explained_in_the_docs():
    pages = [*ROOT.glob("docs/*.md"), ROOT / "README.md"]
    told = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for kind in STAGES:
        assert re.search(rf"\bkind: {kind}\b|`{kind}`|^## {kind}$", told, re.MULTILINE), kind
    for method in METHODS:
        assert f"`{method}`" in told, method


def test_every_data_format_has_an_importer_and_is_listed_in_the_schema():
    named = DataSpec.model_json_schema()["properties"]["format"]["enum"]
    assert sorted(named) == sorted(["auto", *FORMATS, *ALIASES])
    for form in FORMATS.values():
        for place in (form.read, *form.read_for.values()):
            module, _, name = place.partition(":")
            assert callable(getattr(import_module(module), name)), place


def test_algorithms_have_an_estimator_each():
    assert {algorithm.estimator for algorithm in ALGORITHMS.values()} == set(ESTIMATORS)


def test_what_each_tuning_method_can_do():
    def those(fact: str, value: object = True) -> set[str]:
        return {name for name, method in METHODS.items() if getattr(method, fact) == value}

    unmerged, virtual = (
        {"bottleneck", "loreft", "prefix", "prompt", "ptuning"},
        {"prefix", "prompt", "ptuning"},
    )
    assert those("merges", False) == unmerged
    assert those("virtual") == virtual
    assert those("inside_layers", False) == {"head", *virtual}
    assert those("continues") == {"bottleneck", "loreft"}
    assert those("new_at_start") == {"qlora", *unmerged}
    assert those("in_trl", False) == {"pissa", "qlora", *unmerged}
    assert set(METHODS) - those("served_ranks", ()) == {"lora", "rslora"}
    assert set(METHODS) - those("peft_type", None) == unmerged
