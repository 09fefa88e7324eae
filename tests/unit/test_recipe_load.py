"""Loading of recipes: places of mistakes, extends, --set, environment, references, origins."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align.core.errors import RecipeError
from align.recipe.load import load_recipe, load_resolved
from align.recipe.show import resolved_yaml
from align.recipe.source import read_source

GOOD = """\
name: toy
seed: 3
stages:
  base:
    kind: base
    build: {vocab_size: 128}
    data: [{world: corpus}]
    steps: 10
  sft:
    kind: sft
    init: base
    data: [{world: sft, rows: 100}]
    optim: {learning_rate: 1e-5}
  rm:
    kind: reward
    init: sft
    data: [{world: preference}]
  ppo:
    kind: ppo
    init: sft
    prompts: [{world: prompts}]
    rewards:
      - {kind: scalar, model: rm}
    steps: 4
"""


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(GOOD)


def mistakes(text: str, *overrides: str) -> list[str]:
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", overrides)
    return str(caught.value).split("\n")


def with_lines(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_recipe_reads_an_exponent_without_a_dot_as_a_number():
    # PyYAML alone gives the string '1e-5'.
    assert load_recipe("good.yaml").stages["sft"].optim.learning_rate == 0.00001


def test_recipe_reads_no_and_leading_zeros_as_yaml_1_2_does():
    text = with_lines("seed: 3", "seed: 010\ndescription: no")
    Path("r.yaml").write_text(text)
    recipe = load_recipe("r.yaml")
    assert (recipe.seed, recipe.description) == (10, "no")


def test_unknown_key_is_reported_at_its_own_column_with_the_near_name():
    lines = mistakes(with_lines("    steps: 4", "    steps: 4\n    kl: {coeff: 0.1}"))
    # "    kl: {" is nine characters, so the key stands in column 10 of line 25.
    assert lines == ["r.yaml:25:10: stages.ppo.kl.coeff: unknown key; did you mean 'coef'?"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lr", "optim.learning_rate"),
        ("learning_rate", "optim.learning_rate"),
        ("num_train_epochs", "epochs"),
        ("lora_alpha", "tuning.alpha"),
        ("batchsize", "batch_size"),
    ],
)
def test_unknown_key_suggests_where_the_setting_lives(written: str, meant: str):
    lines = mistakes(with_lines("    init: base", f"    init: base\n    {written}: 1"))
    assert lines == [f"r.yaml:12:5: stages.sft.{written}: unknown key; did you mean '{meant}'?"]


def test_all_mistakes_come_at_once_in_order_of_line():
    text = (
        GOOD.replace("seed: 3", "seed: x")
        .replace("rows: 100", "rows: 0")
        .replace("    init: sft\n    data", "    init: stf\n    data")
        .replace("model: rm", "model: sft")
    )
    assert mistakes(text) == [
        "r.yaml:2:7: seed: found 'x'; expected a whole number",
        "r.yaml:12:31: stages.sft.data.0.rows: found 0; expected a whole number >= 1",
        "r.yaml:16:11: stages.rm.init: 'stf' is neither a stage nor a folder; expected an earlier "
        "stage that writes a policy or encoder (base, sft) or the folder of an artifact; did you "
        "mean 'sft'?",
        "r.yaml:23:31: stages.ppo.rewards.0.model: stage 'sft' (sft) writes a policy; expected an "
        "earlier stage that writes a reward_model (rm)",
    ]


def test_wrong_kind_lists_the_kinds_without_pydantic_tags():
    assert mistakes(with_lines("kind: sft", "kind: sftt")) == [
        "r.yaml:10:11: stages.sft.kind: found 'sftt'; expected one of base, encoder, sft, "
        "dpo, kto, reward, classify, ppo, grpo, trl, self_instruct, curate, weak_label, merge, "
        "evaluate; did you mean 'sft'?"
    ]


def test_missing_keys_are_reported_at_the_stage():
    (line,) = mistakes(with_lines("    steps: 4\n", ""))
    assert line == "r.yaml:18:3: stages.ppo.steps: missing; expected a whole number"
    (line,) = mistakes(with_lines("    kind: ppo\n", ""))
    assert line.startswith("r.yaml:18:3: stages.ppo.kind: missing; expected one of base, ")


def test_types_are_strict():
    lines = mistakes(
        with_lines("    init: base", '    init: base\n    batch_size: "12"\n    epochs: true')
    )
    assert lines == [
        "r.yaml:12:17: stages.sft.batch_size: found '12'; expected a whole number; remove the "
        "quotes",
        "r.yaml:13:13: stages.sft.epochs: found true; expected a number",
    ]


def test_union_mistake_is_one_line_with_both_choices():
    (line,) = mistakes(
        with_lines("    init: base", "    init: base\n    tuning: {method: lora, targets: 5}")
    )
    assert line == (
        "r.yaml:12:37: stages.sft.tuning.targets: found 5; expected all-linear or a list (each "
        "item text)"
    )


def test_duplicate_key_names_both_lines():
    assert mistakes(with_lines("    steps: 4", "    steps: 4\n    steps: 5")) == [
        "r.yaml:25:5: stages.ppo.steps: duplicate key; the first is on line 24; remove one"
    ]


def test_broken_yaml_is_reported_with_its_place():
    (line,) = mistakes("name: x\nstages: [\n")
    assert line.startswith("r.yaml:3:1: not valid YAML: ")


def test_a_variable_needs_no_quotes_inside_braces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALIGN_TEST_DATA", "made")
    flow = "[{path: ${ALIGN_TEST_DATA}/a, rows: 7}, {path: ${ALIGN_TEST_NONE:-b}}]"
    Path("r.yaml").write_text(
        f"name: x\nstages:\n  b: {{kind: base, path: hub}}\n"
        f"  s: {{kind: sft, init: b, data: {flow}, steps: 1}}\n"
    )
    data = load_recipe("r.yaml").stages["s"].data
    assert [(d.path, d.rows) for d in data] == [("made/a", 7), ("b", None)]


def test_an_unset_variable_inside_braces_is_named_with_its_place():
    (line,) = mistakes(with_lines("{world: sft, rows: 100}", "{path: ${ALIGN_TEST_X}/a}"))
    assert line.startswith("r.yaml:12:19: ")
    assert "ALIGN_TEST_X is not set" in line


def test_missing_file_suggests_a_neighbour():
    with pytest.raises(RecipeError, match=r"god\.yaml: no such recipe; did you mean 'good\.yaml'"):
        load_recipe("god.yaml")


def test_extends_merges_deeply_replaces_lists_and_keeps_both_origins():
    Path("sub").mkdir()
    Path("sub/child.yaml").write_text(
        "extends: ../good.yaml\nname: child\nstages:\n  sft:\n    optim: {schedule: linear}\n"
        "    data: [{world: sft}]\n  rm: null\n"
        "  ppo:\n    rewards: [{kind: regex, pattern: x}]\n"
    )
    resolved = load_resolved("sub/child.yaml")
    sft = resolved.recipe.stages["sft"]
    assert (sft.optim.schedule, sft.optim.learning_rate) == ("linear", 1e-5)
    assert sft.data[0].rows is None
    assert list(resolved.recipe.stages) == ["base", "sft", "ppo"]
    assert resolved.origins["stages.sft.optim.schedule"] == "sub/child.yaml:5"
    assert resolved.origins["stages.sft.optim.learning_rate"] == "sub/../good.yaml:13"
    assert resolved.origins["stages.sft.data.0.rows"] == "default"
    assert resolved.origins["stages.sft.epochs"] == "default"


def test_extends_with_another_kind_replaces_the_stage():
    Path("r.yaml").write_text(
        "extends: good.yaml\nstages:\n  ppo: {kind: dpo, init: sft, data: [{world: preference}]}\n"
    )
    assert load_recipe("r.yaml").stages["ppo"].kind == "dpo"


def test_extends_circle_is_an_error():
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(RecipeError, match=r"circular: a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe("a.yaml")


def test_set_changes_values_creates_optional_ones_and_picks_list_items():
    resolved = load_resolved(
        "good.yaml",
        [
            "stages.ppo.kl.coef=2e-1",
            "stages.sft.tuning={method: lora, rank: 4}",
            "stages.ppo.rewards.0.weight=2",
        ],
    )
    stages = resolved.recipe.stages
    assert stages["ppo"].kl.coef == 0.2
    assert stages["sft"].tuning.rank == 4
    assert stages["ppo"].rewards[0].weight == 2.0
    assert resolved.origins["stages.ppo.kl.coef"] == "--set"
    assert resolved.origins["stages.sft.tuning.rank"] == "--set"


def test_set_mistakes_are_reported_with_suggestions():
    lines = mistakes(
        GOOD,
        "stages.ppp.steps=1",
        "stages.ppo.kl.coeff=1",
        "stages.ppo.rewards.3.weight=1",
        "stages.ppo.steps.x=1",
        "steps",
        "seed=[",
    )
    assert lines[0] == (
        "--set: stages.ppp.steps: no stage 'ppp'; stages are base, sft, rm, ppo; did you mean "
        "'ppo'?"
    )
    assert lines[1].startswith("--set: stages.ppo.rewards.3.weight: 'stages.ppo.rewards' is a list")
    assert lines[2] == "--set: stages.ppo.steps.x: 'stages.ppo.steps' is 4, which has no keys"
    assert lines[3].startswith("--set: found 'steps'; expected key.path=value")
    assert lines[4].startswith("--set: seed: '[' is not valid YAML")
    assert lines[5] == "--set: stages.ppo.kl.coeff: unknown key; did you mean 'coef'?"


def test_environment_variables_are_filled_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALIGN_TEST_ROWS", "7")
    monkeypatch.delenv("ALIGN_TEST_NAME", raising=False)
    text = GOOD.replace("steps: 10", "steps: ${ALIGN_TEST_ROWS}")
    text = text.replace("seed: 3", "description: a ${ALIGN_TEST_NAME:-word} and $${LITERAL}")
    Path("r.yaml").write_text(text)
    recipe = load_recipe("r.yaml")
    assert recipe.stages["base"].steps == 7
    assert recipe.description == "a word and ${LITERAL}"


def test_missing_environment_variable_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ALIGN_TEST_NAME", raising=False)
    (line,) = mistakes(with_lines("seed: 3", "description: in ${ALIGN_TEST_NAME}"))
    assert line == (
        "r.yaml:2:14: description: the environment variable ALIGN_TEST_NAME is not set; run with "
        "ALIGN_TEST_NAME=... or write ${ALIGN_TEST_NAME:-default}"
    )


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("    init: base\n", "    init: ppo\n", "stage 'ppo' comes later"),
        ("    init: base\n", "    init: sft\n", "a stage cannot refer to itself"),
        ("    init: base\n", "    init: Qwen/Qwen3-0.6B\n", "'kind: base, path: ...'"),
        ("    steps: 4", "    steps: 4\n    critic: {init: nope}", "a policy or reward_model"),
    ],
)
def test_reference_must_name_an_earlier_stage(old: str, new: str, found: str):
    (line,) = mistakes(with_lines(old, new))
    assert found in line


def test_critic_may_start_from_a_reward_model():
    Path("r.yaml").write_text(with_lines("    steps: 4", "    steps: 4\n    critic: {init: rm}"))
    assert load_recipe("r.yaml").stages["ppo"].critic.init == "rm"


def test_reference_may_be_the_folder_of_a_fitting_artifact():
    Path("old/sft").mkdir(parents=True)
    text = with_lines("    init: base\n", "    init: old/sft\n")
    (line,) = mistakes(text)
    assert "'old/sft' is a folder without manifest.json" in line
    Path("old/sft/manifest.json").write_text('{"kind": "reward_model"}')
    (line,) = mistakes(text)
    assert line.endswith("'old/sft' is a reward_model; expected a policy")
    Path("old/sft/manifest.json").write_text('{"kind": "policy"}')
    assert load_recipe("r.yaml").stages["sft"].init == "old/sft"


def test_stage_name_must_be_a_folder_name():
    lines = mistakes(GOOD + "  ../x: {kind: sft, init: base, data: [{world: sft}]}\n")
    assert lines == [
        "r.yaml:25:3: stages.../x: a stage name is also a folder name; expected letters, "
        "digits, '_' and '-' only, 100 at most"
    ]


def test_names_that_no_file_system_takes_are_refused():
    name = "n" * 300
    lines = mistakes(GOOD.replace("toy", name))
    assert lines == ["r.yaml:1:7: name: found 300 characters; expected at most 100"]
    lines = mistakes(GOOD + f"  {name}: {{kind: sft, init: base, data: [{{world: sft}}]}}\n")
    assert "100 at most" in lines[0]


def test_shown_recipe_loads_to_the_same_recipe():
    resolved = load_resolved("good.yaml", ["description='a: ${b} # \"c\"'".replace("$", "$$")])
    Path("again.yaml").write_text(resolved_yaml(resolved))
    assert load_recipe("again.yaml") == resolved.recipe
    assert yaml.safe_load(resolved_yaml(resolved))["stages"]["rm"]["init"] == "sft"
    assert "    init: base " in resolved_yaml(resolved)
    assert "# good.yaml:11" in resolved_yaml(resolved)


def test_check_imports_no_torch():
    code = (
        "import sys; from align.cli import cli; cli(['check', 'good.yaml'], standalone_mode=False)"
        "; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "valid, 4 stages" in done.stdout


def test_recipe_dir_is_the_folder_of_the_file_it_stands_in():
    Path("above").mkdir()
    Path("above/base.yaml").write_text(
        "name: x\nstages:\n  base: {kind: base, build: {}, steps: 1, "
        'data: [{path: "${RECIPE_DIR}/rows.jsonl"}, {path: "$${RECIPE_DIR}/b"}]}\n'
    )
    Path("child.yaml").write_text("extends: above/base.yaml\nname: y\ndescription: ${RECIPE_DIR}\n")
    recipe = load_recipe("child.yaml")
    assert recipe.description == "."
    assert [d.path for d in recipe.stages["base"].data] == ["above/rows.jsonl", "${RECIPE_DIR}/b"]
    assert load_recipe(Path("child.yaml").resolve()).description == str(Path.cwd())


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("name: x\n\tseed: 1", "2:1", "Indent with spaces"),
        ("name: a: b", "1:8", "Put a text that contains ': ' in quotes"),
        ("name: [1, 2\nseed: 3", "2:5", "the list that begins with '[' in line 1 is not closed"),
        ("name: {x: 1\nseed: 3", "2:5", "the mapping that begins with '{' in line 1"),
        ("name: x\nseed\nstages: 2", "3:1", "the key in line 2 has no ':'"),
        ("name:\n  b: 1\n c: 2", "3:2", "indented differently"),
        ("name: x\ndescription: 'x\nseed: 1\n", "2:14", "this quote is not closed"),
        ("name: *x", "1:7", "refers to no '&NAME'"),
        ("- a\nseed: 1", "2:1", "the entries of a list begin with '- '"),
        ('name: "\\q"', "1:8", "Use single quotes"),
        ("name: 1\n---\nseed: 1", "2:1", "a second document"),
    ],
)
def test_a_mistake_of_yaml_is_explained_in_words(tmp_path, text, place, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as found:
        load_recipe(path)
    (line,) = str(found.value).splitlines()
    assert line.startswith(f"{path}:{place}: not valid YAML: ")
    assert words in line


def test_merged_mappings_that_merge_others_are_read_as_by_pyyaml():
    text = """\
a: &a {x: 1, y: 1, z: {w: 1}}
b: &b {<<: *a, y: 2, v: 2}
c: &c {x: 3, u: 3, v: 3}
d: {<<: [*b, *c], v: 4}
e: {<<: [*c, *b]}
f: &f {<<: *b, t: {<<: *c, x: 5}}
g: {<<: [*f, *a, *f]}
"""
    Path("m.yaml").write_text(text)
    found = read_source(Path("m.yaml"))
    assert found.errors == []
    assert found.data == yaml.safe_load(text)
    assert found.data["d"] == {"x": 1, "y": 2, "z": {"w": 1}, "v": 4, "u": 3}
    Path("m.yaml").write_text("a: &a {x: 1, <<: *a}\nb: {<<: *a}\n")
    found = read_source(Path("m.yaml"))
    (error,) = found.errors
    assert error.startswith("m.yaml:1:4: a: an alias that contains itself")
