"""Files that are no recipe: each is one line that says what the file is and what to do."""

from pathlib import Path

import pytest

from align.core.errors import RecipeError
from align.recipe.load import load_recipe

BASE = "name: x\nstages:\n  base:\n    kind: base\n    path: org/model\n"
ROW = '{"prompt": "a", "completion": "b"}\n'
VERL = "data:\n  train_files: a\nactor_rollout_ref:\n  model: b\nalgorithm: {}\ntrainer: {}\n"
OPENRLHF = "pretrain: a/b\nprompt_data: c/d\ninit_kl_coef: 0.01\nkl_estimator: k1\n"
TORCHTUNE = "output_dir: a\ntokenizer: {_component_: b}\ndataset: {}\nmodel: {}\n"
LINES = {
    "empty.yaml": (b"", "the file is empty"),
    "comment.yaml": (b"# nothing\n", "the file is empty"),
    "utf16.yaml": (BASE.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    "latin.yaml": ("name: x\na: Gr\xf6\xdfe\n".encode("latin-1"), "latin.yaml:2:6: byte 0xf6"),
    "weights.safetensors": (b'\x64\0\0\0\0\0\0\0{"a": 1}', "a binary file (byte 1 is 0)"),
    "list.yaml": (b"# a\n- a\n", "list.yaml:2:1: found a list"),
    "text.yaml": (b"hello\n", "text.yaml:1:1: found text"),
    "rows.jsonl": ((ROW * 2).encode(), "data, not a recipe; write one for it: align init --data"),
    "rows.json": ((ROW * 2).encode(), "data, not a recipe"),
    "train.py": (b"import align\nalign.sft(model='x')\n", "a Python script; run it with python"),
    "page.md": (b"# A\n\n```yaml\nname: x\n```\n", "a Markdown page"),
    "verl.yaml": (VERL.encode(), "this looks like a configuration of verl"),
    "openrlhf.yaml": (OPENRLHF.encode(), "this looks like a configuration of OpenRLHF"),
    "tune.yaml": (
        TORCHTUNE.encode(),
        "not a recipe. Expected the keys 'name' and 'stages', found out",
    ),
    "braces.yaml": (BASE.replace("x", "{{ x }}", 1).encode(), "Put {{ }} in quotes"),
    "tag.yaml": (BASE.replace("x", "!env X", 1).encode(), "YAML tag '!env' is not used"),
    "quotes.yaml": (BASE.replace("x", "\u201cx\u201d", 1).encode(), "a typographic quote"),
    "steps.yaml": (BASE.encode() + b"\xc2\xa0\xc2\xa0dtype: float32\n", "non-breaking space"),
    "stages.yaml": (b"name: x\nstages:\n  - kind: sft\n", "of each stage's name to its settings"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_file_that_is_no_recipe_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, told = LINES[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    with pytest.raises(RecipeError) as error:
        load_recipe(name)
    (line,) = str(error.value).splitlines()
    assert line.startswith(name)
    assert told in line


def test_a_folder_is_one_line_and_one_of_a_run_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a folder\\. Expected a recipe"):
        load_recipe(tmp_path)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match="a folder of runs; its results: align show"):
        load_recipe(tmp_path)
