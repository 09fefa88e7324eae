"""``align check`` reads from the files of a tokenizer what transformers finds when it loads it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from align.cli import cli
from align.core.errors import ArtifactError
from align.core.model_folder import check_files, lacking_of_tokenizer
from tests.unit.small_tokenizers import byte_tokenizer

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SAID = "tokenizer_config.json"
ALL = {"pad_token": "<pad>", "eos_token": "</s>", "chat_template": "{{ messages }}"}


def folder_with(place: Path, saved: dict[str, Any], **more: Any) -> Path:
    """Return a model folder with these entries of its tokenizer's settings, and no others."""
    byte_tokenizer(None).save_pretrained(str(place))
    (place / "special_tokens_map.json").unlink(missing_ok=True)
    (place / SAID).write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | saved))
    (place / "config.json").write_text(json.dumps(CONFIG | more))
    (place / "model.safetensors").write_bytes(b"weights")
    return place


def loaded_without(folder: Path) -> set[str]:
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    return {name for name in ALL if getattr(tokenizer, name) is None}


@pytest.mark.parametrize("absent", [(), *((name,) for name in ALL), tuple(ALL)])
def test_what_is_absent_is_what_transformers_does_not_find(tmp_path: Path, absent: tuple[str, ...]):
    folder = folder_with(tmp_path / "m", {k: v for k, v in ALL.items() if k not in absent})
    assert lacking_of_tokenizer(str(folder)) == loaded_without(folder) == set(absent)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "X"])
@pytest.mark.parametrize("said", [{}, {"pad_token": None}, {"eos_token": None}])
def test_nothing_is_called_absent_that_a_class_has_by_default(
    tmp_path: Path, name: str, said: dict[str, None]
):
    folder = folder_with(tmp_path / "m", {"tokenizer_class": name, **said})
    assert lacking_of_tokenizer(str(folder)) <= loaded_without(folder)


def test_a_token_or_template_in_another_file_is_there(tmp_path: Path):
    folder = folder_with(tmp_path / "m", {"eos_token": "</s>"})
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["padding"] = {
        **{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    (folder / "chat_template.jinja").write_text(ALL["chat_template"])
    assert lacking_of_tokenizer(str(folder)) == loaded_without(folder) == set()


def checked(place: Path, folder: Path, keys: str = "") -> tuple[int, str]:
    recipe = place / "my.yaml"
    recipe.write_text(f"name: my\nstages:\n  it:\n    {{kind: base, path: {folder}{keys}}}\n")
    found = CliRunner().invoke(cli, ["check", str(recipe)])
    return found.exit_code, str(found.exception or found.output)


def test_align_check_names_what_neither_tokenizer_nor_recipe_has(tmp_path: Path):
    folder = folder_with(tmp_path / "m", {"eos_token": "</s>"})
    code, text = checked(tmp_path, folder)
    assert code != 0
    # "    {kind: base, path: " has 23 characters, and columns count from 1.
    assert text.startswith(f"{tmp_path}/my.yaml:4:24: stages.it.path: the tokenizer has no pad")
    assert "has no chat template" in text
    assert "has no stop token" not in text
    _, text = checked(tmp_path, folder, ", tokenizer: {pad_token: <pad>}")
    assert "pad token" not in text
    assert "has no chat template" in text
    both = ", tokenizer: {pad_token: <pad>, chat_template: plain}"
    assert checked(tmp_path, folder, both)[0] == 0
    # chatml brings its own stop token, plain does not.
    bare = folder_with(tmp_path / "n", {"pad_token": "<pad>"})
    assert "no stop token" in checked(tmp_path, bare, ", tokenizer: {chat_template: plain}")[1]
    assert checked(tmp_path, bare, ", tokenizer: {chat_template: chatml}")[0] == 0


def test_align_check_names_a_folder_that_cannot_be_trained(tmp_path: Path):
    quantized = {"quantization_config": {"quant_method": "gptq"}}
    classifier = {"architectures": ["LlamaForSequenceClassification"]}
    for number, (more, told) in enumerate(((quantized, "(gptq)"), (classifier, "kind encoder"))):
        folder = folder_with(tmp_path / str(number), ALL, **more)
        code, text = checked(tmp_path, folder)
        assert code != 0
        assert told in text


@pytest.mark.parametrize("value", ["auto", "bf16", "torch.float32", 7, ["float32"]])
@pytest.mark.parametrize("of_text", [False, True])
def test_a_dtype_that_torch_does_not_know_is_named(tmp_path: Path, value: Any, of_text: bool):
    more = {"text_config": {"dtype": value}} if of_text else {"torch_dtype": value}
    folder = folder_with(tmp_path / "m", ALL, **more)
    where = "config.json: text_config: dtype" if of_text else "config.json: torch_dtype"
    with pytest.raises(ArtifactError, match=f"{where}: .* is no dtype of weights"):
        check_files(str(folder))


@pytest.mark.parametrize("value", [None, "float32", "bfloat16", "float16"])
def test_dtypes_of_torch_are_accepted(tmp_path: Path, value: str | None):
    folder = folder_with(tmp_path / "m", ALL, dtype=value, text_config={"torch_dtype": value})
    assert check_files(str(folder))["dtype"] == value
