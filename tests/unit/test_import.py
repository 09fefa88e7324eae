"""Configurations of axolotl, LLaMA-Factory and TRL as recipes: nothing is dropped in silence."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.core.errors import RecipeError
from align.recipe.algorithms import PAIR_LOSSES
from align.recipe.foreign.convert import TOOLS, convert
from align.recipe.foreign.keys import Keys, Note
from align.recipe.foreign.tools import recognize
from align.recipe.load import load_recipe
from align.recipe.source import Mark
from tests.foreign_configs import AXOLOTL, FACTORY, OWN, TRL, Config, configs

CONFIGS = configs()
PUBLIC = len(AXOLOTL) + len(FACTORY) + len(TRL)


def written(path: Path, config: Config) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def whole(tool: str, config: Config) -> tuple[dict[str, Any], set[tuple[str, str]]]:
    """The recipe and the notes of a configuration, without files."""
    notes: list[Note] = []
    keys = Keys(config, {(): Mark("c.yaml", 1)}, at=(), notes=notes)
    return TOOLS[tool].convert(keys, None).whole(), {(note.key, note.what) for note in notes}


def test_share_of_public_configurations_that_start(tmp_path: Path):
    assert PUBLIC >= 30
    failed = {}
    for i, (tool, name, config) in enumerate(CONFIGS[:PUBLIC]):
        folder = tmp_path / str(i)
        folder.mkdir()
        try:
            made = convert(tool, written(folder / "config.yaml", config))
            for file, text in {"recipe.yaml": made.text, **made.files}.items():
                (folder / file).write_text(text)
            load_recipe(folder / "recipe.yaml")
        except RecipeError as error:
            failed[name] = str(error)
    shown = f"{PUBLIC - len(failed)} of {PUBLIC} start; not: {', '.join(failed)}"
    print(shown)  # noqa: T201  docs/import.md quotes the number
    assert set(failed) == {
        "train_lora/llama3_lora_ppo.yaml",
        "train_lora/qwen2_5vl_lora_sft.yaml",
        "Qwen2.5-1.5B-Instruct/grpo/config_demo.yaml",
        "Qwen2.5-Coder-7B-Instruct/grpo/config_codeforces.yaml",
    }


def other(value: Any) -> Any:
    """Another value of the same sort."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 3
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value[:-1], other(value[-1])] if value else value
    return {key: other(inside) for key, inside in value.items()} if value else value


OTHERS = {
    **{"optimizer": "sgd", "optim": "sgd", "save_strategy": "epoch", "eval_strategy": "epoch"},
    "evaluation_strategy": "epoch",
}
"""Values to compare with where a changed word would mean the same."""
ALIKE = {"load_in_4bit": "adapter", "bf16": "torch_dtype", "torch_dtype": "bf16"}
"""Keys whose meaning another key repeats: both are changed."""


@pytest.mark.parametrize(("tool", "name", "config"), CONFIGS, ids=[name for _, name, _ in CONFIGS])
def test_every_key_is_in_the_recipe_or_in_the_notes(tool: str, name: str, config: Config):
    try:
        recipe, notes = whole(tool, config)
    except RecipeError:
        return
    noted = {key.partition(".")[0] for key, _ in notes}
    for key, value in config.items():
        if value is None or key in noted:
            continue
        left_out = {k: v for k, v in config.items() if k not in (key, ALIKE.get(key))}
        told = []
        for variant in (left_out, config | {key: OTHERS.get(key, other(value))}):
            try:
                told.append(whole(tool, variant))
            except RecipeError as error:
                told.append(str(error))
        # Either without the key or with another value, something must differ.
        assert any(result != (recipe, notes) for result in told), f"{name}: {key} has no effect"


def test_a_misspelt_key_is_named_with_its_line(tmp_path: Path):
    config = AXOLOTL["llama-3/lora-8b.yml"] | {"lora_rankk": 4}
    file = written(tmp_path / "c.yml", config)
    line = file.read_text().splitlines().index("lora_rankk: 4") + 1
    (note,) = [n for n in convert("axolotl", file).notes if n.key == "lora_rankk"]
    assert note.lost
    assert note.line.startswith(f"{file}:{line}: lora_rankk: NOT CONVERTED: not among the keys of")
    assert f"line {line}: lora_rankk: not among the keys" in convert("axolotl", file).text


def test_numbers_of_an_axolotl_lora(tmp_path: Path):
    made = convert("axolotl", written(tmp_path / "c.yml", AXOLOTL["llama-3/lora-8b.yml"]))
    recipe = yaml.safe_load(made.text)
    sft = recipe["stages"]["sft"]
    assert recipe["stages"]["base"]["path"] == "NousResearch/Meta-Llama-3-8B"
    assert sft["tuning"] == {
        **{"method": "lora", "rank": 32, "alpha": 16.0, "dropout": 0.05, "targets": "all-linear"}
    }
    # 2 rows x 4 accumulated; 2 rows of 4096 tokens.
    assert (sft["batch_size"], sft["micro_tokens"], sft["max_length"]) == (8, 8192, 4096)
    assert (sft["epochs"], sft["optim"]["learning_rate"], sft["optim"]["warmup_frac"]) == (
        *(4.0, 2e-4),
        0.1,
    )
    source = {"path": "mhenrichsen/alpaca_2k_test:train", "format": "alpaca", "heldout_frac": 0.05}
    assert sft["data"] == [{**source, "split": "train"}]
    assert sft["heldout"] == [{**source, "split": "heldout"}]


def test_numbers_of_a_trl_grpo(tmp_path: Path):
    config = TRL["OpenR1-Zero-7B-Math/grpo/config_v08.00.yaml"]
    grpo = yaml.safe_load(convert("trl", written(tmp_path / "c.yml", config)).text)["stages"][
        "grpo"
    ]
    # 512 completions in groups of 16 are 32 prompts; 4 x 16 completions per optimizer step are 8
    # steps per generation.
    assert (grpo["group_size"], grpo["prompts_per_step"], grpo["minibatches"]) == (16, 32, 8)
    assert (grpo["clip"], grpo["truncation"]) == ({"low": 0.2, "high": 0.2}, "mask")
    assert grpo["max_length"] == 512 + 8192
    assert [(r["kind"], r.get("weight", 1.0)) for r in grpo["rewards"]] == [
        ("math", 1.0),
        ("format", 0.25),
    ]
    assert "kl" not in grpo  # beta 0


def test_rloo_of_trl_is_the_algorithm_of_that_name(tmp_path: Path):
    """TRL 1.16's RLOOConfig: groups of 2 and beta 0.05, whose KL is subtracted from the reward."""
    config = {
        **{"model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_name": "trl-lib/DeepMath-103K"},
        **{"reward_funcs": ["reasoning_accuracy_reward", "get_soft_overlong_punishment"]},
        **{"output_dir": "runs/rloo-qwen", "reward_weights": [1.0, 0.5]},
    }
    made = convert("trl", written(tmp_path / "c.yml", config))
    stage = yaml.safe_load(made.text)["stages"]["grpo"]
    assert (stage["algorithm"], stage["group_size"]) == ("rloo", 2)
    assert stage["kl"] == {"coef": 0.05, "place": "reward", "estimator": "k1"}
    assert not {"clip", "scale", "aggregation"} & stage.keys()
    limits = {"max_completion_len": 1280, "soft_punish_cache": 256}  # trl/scripts/grpo.py
    assert stage["rewards"] == [
        {"kind": "python", "path": "trl.rewards:reasoning_accuracy_reward"},
        {
            **{"kind": "python", "path": "trl.rewards:get_soft_overlong_punishment"},
            **{"args": limits, "weight": 0.5},
        },
    ]
    (tmp_path / "r.yaml").write_text(made.text)
    assert load_recipe(tmp_path / "r.yaml").stages["grpo"].kind == "grpo"
    several = written(tmp_path / "d.yml", config | {"num_iterations": 2, "normalize_advantages": 1})
    made = convert("trl", several)
    assert yaml.safe_load(made.text)["stages"]["grpo"]["clip"] == {"low": 0.2, "high": 0.2}
    lost = {note.key for note in made.notes if note.lost}
    assert {"num_iterations", "normalize_advantages"} <= lost


def test_axolotl_transforms_are_named_and_what_rows_have_anyway_is_not(tmp_path: Path):
    asked = {"path": "openai/gsm8k", "name": "main", "type": "rewards.oai_gsm8k_transform"}
    config = OWN["axolotl, grpo"][1] | {"datasets": [asked], "rl_beta": 0.04}
    del config["trl"]["beta"]
    made = convert("axolotl", written(tmp_path / "c.yml", config))
    (note,) = [note for note in made.notes if note.key == "datasets.0.type"]
    assert note.lost
    assert "write map: FILE.py:FUNCTION" in note.what
    assert yaml.safe_load(made.text)["stages"]["grpo"]["kl"]["coef"] == 0.04
    tools = {
        **{"path": "rows.jsonl", "type": "chat_template", "field_messages": "conversations"},
        **{"message_property_mappings": {"role": "from", "content": "value"}},
        **{"roles_to_train": ["assistant"], "message_field_training": "train"},
        **{"field_tools": "tools"},
    }
    base = {"base_model": "Qwen/Qwen3-0.6B", "learning_rate": 1e-5}
    made = convert("axolotl", written(tmp_path / "d.yml", base | {"datasets": [tools]}))
    assert not [note for note in made.notes if note.lost]
    other = tools | {"field_tools": "api", "message_field_training": "learn"}
    other["roles_to_train"] = ["assistant", "user"]
    made = convert("axolotl", written(tmp_path / "e.yml", base | {"datasets": [other]}))
    lost = {note.key.rpartition(".")[2] for note in made.notes if note.lost}
    assert lost == {"field_tools", "message_field_training", "roles_to_train"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    # Names that LLaMA-Factory 0.9.5 registers; benchmarks/masks.py compares the rows.
    [("gpt_oss", "gpt_oss"), ("qwen3_nothink", "qwen3_instruct"), ("qwen", "qwen2_5")],
)
def test_llama_factory_templates_have_a_name_here(theirs: str, ours: str, tmp_path: Path):
    config = FACTORY["train_lora/llama3_lora_sft.yaml"] | {"template": theirs}
    made = convert("llamafactory", written(tmp_path / "c.yaml", config))
    assert yaml.safe_load(made.text)["stages"]["base"]["tokenizer"] == {"chat_template": ours}
    told = [note.what for note in made.notes if note.key == "template"]
    assert bool(told) == (theirs == "gpt_oss")


def test_llama_factory_names_are_looked_up_in_dataset_info(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(
        '{"identity": {"file_name": "identity.json"}, "alpaca_en_demo": '
        '{"hf_hub_url": "org/alpaca", "split": "test", '
        '"columns": {"prompt": "question", "response": "reply"}}}'
    )
    config = FACTORY["train_lora/llama3_lora_sft.yaml"]
    made = convert("llamafactory", written(tmp_path / "c.yaml", config))
    data = yaml.safe_load(made.text)["stages"]["sft"]["data"]
    assert [source["path"].rpartition("/data/")[2] for source in data] == [
        *("identity.json", "org/alpaca:test")
    ]
    assert data[1]["rename"] == {"question": "instruction", "reply": "output"}
    assert not any(note.key == "dataset" for note in made.notes)


@pytest.mark.parametrize(
    ("tool", "change", "told"),
    [
        ("axolotl", {"rl": "bco"}, "rl: 'bco' has no stage in align; it has dpo"),
        ("axolotl", {"adapter": "llama-adapter"}, "adapter: 'llama-adapter' has no equivalent"),
        ("axolotl", {"processor_type": "AutoProcessor"}, "processor_type: align trains on text"),
        ("axolotl", {"datasets": None}, "datasets: is missing"),
        ("axolotl", {"datasets": "rows"}, None),
        ("axolotl", {"lora_r": "many"}, "lora_r: found 'many'; expected a number"),
        ("axolotl", {"special_tokens": ["a"]}, "special_tokens: found a list"),
        ("llamafactory", {"stage": "grpo"}, "stage: 'grpo' is not a stage; expected one of pt"),
        ("trl", {"loss_type": "exo_pair", "beta": 0.1}, None),
    ],
)
def test_what_cannot_be_converted_is_one_line_with_its_place(
    tool: str, change: Config, told: str | None, tmp_path: Path
):
    base = {"axolotl": AXOLOTL["llama-3/lora-8b.yml"], "trl": OWN["TRL, reward"][1]}
    config = base.get(tool, FACTORY["train_lora/llama3_lora_sft.yaml"]) | change
    file = written(tmp_path / "c.yaml", config)
    if told is None:
        convert(tool, file)
        return
    with pytest.raises(RecipeError) as caught:
        convert(tool, file)
    assert re.match(rf"{re.escape(str(file))}:\d+: {re.escape(told)}", str(caught.value))
    assert len(str(caught.value).splitlines()) == 1


def converted(tool: str, **keys: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The training stage and the notes by key of a small configuration with these keys."""
    config = dict(next(c for at, name, c in CONFIGS if at == tool and "dpo" in name.lower()))
    for name in ("save_strategy", "save_steps", "save_total_limit", "bf16", "fp16", "torch_dtype"):
        config.pop(name, None)
    recipe, notes = whole(tool, {**config, **keys})
    return recipe["stages"]["dpo"], dict(notes)


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory", "trl"])
@pytest.mark.parametrize(
    ("word", "dtype"),
    [(w, "bfloat16") for w in (True, 1, "yes", "Y", "true", "True", "on", "1", "full")]
    + [(w, "float32") for w in (False, 0, "no", "off", "False", "0", "")]
    + [("auto", "auto")],
)
def test_words_of_truth_choose_the_number_format(tool: str, word: Any, dtype: str):
    assert converted(tool, bf16=word)[0]["dtype"] == dtype


@pytest.mark.parametrize(
    ("keys", "expected", "noted"),
    [
        # The number of checkpoints holds for the steps that align chooses too.
        ({"save_total_limit": 3}, {"keep_checkpoints": 3}, set()),
        (
            {"save_strategy": "epoch", "save_total_limit": 3},
            {"keep_checkpoints": 3},
            {"save_strategy"},
        ),
        ({"save_strategy": "best"}, {}, {"save_strategy"}),
        (
            {"save_steps": 50, "save_total_limit": 1},
            {"checkpoint_every": 50, "keep_checkpoints": 1},
            set(),
        ),
        ({"save_strategy": "steps", "save_steps": 50}, {"checkpoint_every": 50}, set()),
        # Without checkpoints there, none here: the default is not none.
        ({"save_strategy": "no"}, {"checkpoint_every": 0}, set()),
        ({"save_strategy": False, "save_steps": 9}, {"checkpoint_every": 0}, {"save_steps"}),
        (
            {"save_strategy": "No", "save_total_limit": 2},
            {"checkpoint_every": 0},
            {"save_total_limit"},
        ),
        ({"save_total_limit": 0}, {}, {"save_total_limit"}),
    ],
)
@pytest.mark.parametrize("tool", ["axolotl", "llamafactory", "trl"])
def test_checkpoints_are_those_of_the_other_tool(
    tool: str, keys: dict[str, Any], expected: dict[str, int], noted: set[str]
):
    stage, notes = converted(tool, **keys)
    found = {
        name: stage[name] for name in ("checkpoint_every", "keep_checkpoints") if name in stage
    }
    assert found == expected
    assert {name for name in notes if name.startswith("save_")} == noted


@pytest.mark.parametrize("loss", [*PAIR_LOSSES, "exo_pair"])
def test_every_pair_loss_is_converted_and_no_other(loss: str):
    if loss in PAIR_LOSSES:
        assert converted("trl", loss_type=loss)[0]["loss"] == loss
        return
    with pytest.raises(RecipeError, match=r"loss_type: exo_pair; align has sigmoid, .*, orpo$"):
        converted("trl", loss_type=loss)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio", "mlflow", "swanlab"])
def test_every_tracker_is_converted(tracker: str):
    for tool, keys in (("trl", {"report_to": tracker}), ("llamafactory", {f"use_{tracker}": True})):
        config = next(config for at, _, config in CONFIGS if at == tool)
        config = {k: v for k, v in config.items() if k != "report_to"}
        assert whole(tool, config | keys)[0]["sinks"] == {tracker: True}


STRANGE = ("", "x", "a\nb", [], [[1]], [None], {"a": [1]}, -1, 0.5, True, 10**30)


def refusal(tool: str, config: Config) -> str | None:
    """The message of a refused configuration; any other error goes through."""
    try:
        whole(tool, config)
    except RecipeError as error:
        return str(error)
    return None


def test_a_value_of_another_type_is_an_error_of_the_user_or_converted():
    told = {
        refusal(tool, config | {key: value})
        for tool, _, config in CONFIGS
        for key in config
        for value in STRANGE
    }
    # One line each, which names the place and the key.
    assert len(told) > 100
    assert [
        line for line in told if line and not re.fullmatch(r"c\.yaml:1: [\w.]+: .+", line)
    ] == []


def test_a_trl_file_without_a_telling_key_asks_for_the_method(tmp_path: Path):
    config = {"model_name_or_path": "a/b", "dataset_name": "c/d", "output_dir": "out"}
    file = written(tmp_path / "c.yaml", config)
    with pytest.raises(RecipeError, match=r"c\.yaml:3: output_dir: the trainer is not named; add"):
        convert("trl", file)
    made = convert("trl", file, method="kto")
    assert yaml.safe_load(made.text)["stages"]["kto"]["optim"]["learning_rate"] == 1e-6


@pytest.mark.parametrize(("tool", "name", "config"), CONFIGS, ids=[name for _, name, _ in CONFIGS])
def test_a_configuration_is_recognized(tool: str, name: str, config: Config):
    assert recognize(config) == tool


def test_check_of_a_foreign_configuration_names_the_command(tmp_path: Path):
    file = written(tmp_path / "c.yaml", AXOLOTL["qwen2/dpo.yaml"])
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    told = f"this looks like a configuration of axolotl; convert it: align import axolotl {file}"
    assert str(caught.value) == f"{file}: {told}"


def test_the_command_writes_a_valid_recipe_and_never_overwrites(tmp_path: Path):
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "align", "import", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    written(tmp_path / "c.yaml", TRL["smollm/sft/config.yaml"])
    done = call("trl", "c.yaml", "--out", "sub/r.yaml")
    assert done.returncode == 0, done.stderr
    assert "sub/r.yaml: valid" in done.stdout
    assert any(re.match(r"c\.yaml:\d+: eval_strategy: NOT", x) for x in done.stderr.splitlines())
    assert (tmp_path / "sub/chat_template.jinja").read_text().startswith("{% for m in messages %}")
    done = call("trl", "c.yaml", "--out", "sub/r.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "sub/r.yaml: exists already" in done.stderr
