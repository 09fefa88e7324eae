"""align init: a recipe from a model and data, by the format of the first rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.cli.proposal import propose
from align.core.errors import AlignError
from align.recipe.load import load_recipe

ROWS: dict[str, dict[str, Any]] = {
    "sft": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "chats": {"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c"},
    "good": {"prompt": "a", "completion": "b", "label": True},
    "math": {"prompt": "1 + 1?", "answer": "2"},
    "words": {"prompt": "Red in French?", "answer": "rouge"},
    "texts": {"text": "a"},
    "steps": {"prompt": "a", "completions": ["b"], "labels": [True]},
}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, row in ROWS.items():
        Path(f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("model/tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def stages(*data: str, tuning: str = "lora") -> dict[str, Any]:
    """The stages that are proposed; the recipe must be valid."""
    made = propose("model", [f"{name}.jsonl" for name in data], name="r", tuning=tuning)
    Path("r.yaml").write_text(made.text)
    load_recipe("r.yaml")
    return yaml.safe_load(made.text)["stages"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("sft", "sft"), ("alpaca", "sft"), ("texts", "sft"), ("pairs", "dpo"), ("chats", "dpo")),
        *(("good", "kto"), ("math", "grpo"), ("words", "grpo"), ("steps", "reward")),
    ],
)
def test_the_format_of_the_rows_decides_on_the_stage(name: str, kind: str):
    assert list(stages(name)) == ["base", kind]


def test_several_sources_become_stages_that_start_from_each_other():
    found = stages("math", "pairs", "sft", "alpaca")
    assert list(found) == ["base", "sft", "dpo", "grpo"]
    assert [found[name]["init"] for name in ("sft", "dpo", "grpo")] == ["base", "sft", "dpo"]
    assert [source["path"] for source in found["sft"]["data"]] == ["sft.jsonl", "alpaca.jsonl"]
    (held_out,) = found["dpo"]["heldout"]
    # Beside alpaca's rows, which are conversations, the pairs are turns too.
    assert held_out == {"path": "pairs.jsonl", "split": "heldout", "strings": "chat"}
    assert found["grpo"]["rewards"] == [{"kind": "math", "column": "answer"}]
    # An adapter does not train the row of a new stop token, so the template must not add one.
    assert found["base"]["tokenizer"] == {"pad_token": "</s>", "chat_template": "plain"}
    full = stages("sft", tuning="full")["base"]["tokenizer"]
    assert full == {"pad_token": "</s>", "chat_template": "chatml"}
    assert "tuning" not in stages("sft", tuning="full")["sft"]
    assert stages("words")["grpo"]["rewards"] == [{"kind": "exact_match", "column": "answer"}]


def test_a_dataset_with_its_own_splits_keeps_them():
    Path("set").mkdir()
    for split in ("train", "test"):
        Path(f"set/{split}.jsonl").write_text(Path("pairs.jsonl").read_text())
    text = propose("model", ["set"], name="r", tuning="lora").text
    dpo = yaml.safe_load(text)["stages"]["dpo"]
    assert (dpo["data"], dpo["heldout"]) == (
        [{"path": "set", "split": "train", "strings": "text"}],
        [{"path": "set", "split": "test", "strings": "text"}],
    )


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_plain_texts_are_for_the_template_of_an_instruct_model(file: str):
    template = "{{ messages }}"
    text = json.dumps({"chat_template": template}) if file.endswith("json") else template
    Path("model", file).write_text(text)
    found = stages("sft", "pairs", "good", "math", "texts", "chats")
    (answers, texts), (pairs, chats) = found["sft"]["data"], found["dpo"]["data"]
    plain = [answers, pairs, found["kto"]["data"][0], found["grpo"]["prompts"][0]]
    assert [source["strings"] for source in plain] == ["chat"] * 4
    # A text has no prompt, and a conversation has its turns.
    assert not {"strings"} & {*texts, *chats}
    assert "# strings: chat renders plain prompts" in Path("r.yaml").read_text()


def test_plain_texts_beside_conversations_are_turns_too():
    found = stages("pairs", "alpaca")
    assert found["dpo"]["data"][0]["strings"] == "chat"
    assert "strings" not in found["sft"]["data"][0]
    assert stages("pairs")["dpo"]["data"][0]["strings"] == "text"
    stages("alpaca")
    assert "# strings" not in Path("r.yaml").read_text()


@pytest.mark.parametrize(
    ("model", "row", "told"),
    [
        ("model", {"prompt": "a"}, "x.jsonl: prompts without an expected answer"),
        ("model", {"strange": "a"}, "x.jsonl:1: no known format has the fields"),
        ("nowhere", {"text": "a"}, "nowhere: no such model; expected RUN/STAGE"),
    ],
)
def test_what_gives_no_recipe_is_one_line(model: str, row: dict[str, Any], told: str):
    Path("x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(AlignError) as caught:
        propose(model, ["x.jsonl"], name="r", tuning="lora")
    assert str(caught.value).startswith(told)


def test_the_command_asks_on_a_terminal_and_names_the_flag_without_one():
    command = [sys.executable, "-m", "align", "init"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "--model is missing; without a terminal there is nobody to ask\n"
    terminal, inside = os.openpty()
    os.write(terminal, b"model\nsft.jsonl pairs.jsonl\n")
    done = subprocess.run(command, stdin=inside, capture_output=True, text=True, check=False)
    os.close(terminal)
    os.close(inside)
    assert done.returncode == 0, done.stderr
    assert "sft.jsonl: prompt_completion, for a sft stage" in done.stdout
    assert "my-run.yaml: written and valid" in done.stdout
    schema = Path("my-run.yaml").read_text().partition("\n")[0].rpartition("$schema=")[2]
    assert json.loads(Path(schema).read_text())["properties"]["stages"]
