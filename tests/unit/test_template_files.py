"""Chat templates of a model folder are found in each of the places where programs keep them."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_base_tokens import bring_in, saved_model

from align.core.errors import AlignError
from align.models.loading import load_tokenizer
from align.recipe.schema import TokenizerSpec

ONE = (
    "{% for m in messages %}{{ m['role'] + '> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
)
OTHER = ONE.replace("> ", "] ")
TOLD = "user> q\nassistant> a</s>\n"
SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "in", tied=True)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "brought"))


def set_template(folder: Path, value: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": value}))


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))


def brought(folder: Path) -> str:
    """Import the folder, and return how the saved model's tokenizer writes a conversation."""
    out = folder.parent / "out"
    model_dir, _ = bring_in(folder, out, TokenizerSpec(pad_token="<pad>"))
    return load_tokenizer(model_dir).apply_chat_template(SAID, tokenize=False)


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": ONE},
        {"chat_template.json": {"chat_template": ONE}},
        {"chat_templates/default.jinja": ONE, "chat_templates/tools.jinja": OTHER},
        {"chat_templates/any.jinja": ONE},
        {"chat_template.jinja": ONE, "additional_chat_templates/tool_use.jinja": OTHER},
        {"chat_template.jinja": "\ufeff" + ONE},
        {"chat_templates/any.jinja": "\ufeff" + ONE},
    ],
)
def test_a_template_in_a_file_of_its_own_is_used(folder: Path, files: dict[str, Any]) -> None:
    write(folder, files)
    assert brought(folder) == TOLD


def test_the_tokenizers_own_template_comes_first_and_a_found_one_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, {"chat_template.json": {"chat_template": OTHER}})
    with caplog.at_level(logging.WARNING):
        load_tokenizer(folder)
    assert "chat_template.json: its chat template is used" in caplog.text
    set_template(folder, ONE)
    assert brought(folder) == TOLD


def test_the_default_of_several_templates_is_used(folder: Path) -> None:
    both = [{"name": "tool_use", "template": OTHER}, {"name": "default", "template": ONE}]
    set_template(folder, both)
    assert brought(folder) == TOLD


@pytest.mark.parametrize(
    ("value", "files", "told"),
    [
        ([{"name": "rag", "template": ONE}], {}, "'rag', and none is named 'default'"),
        (None, {"additional_chat_templates/rag.jinja": ONE}, "'rag', and none is named 'default'"),
        (None, {"chat_templates/a.jinja": ONE, "chat_templates/b.jinja": ONE}, "none is named"),
        (None, {"chat_template.json": {"template": ONE}}, "no chat_template in it"),
        (None, {"chat_template.json": {"chat_template": [ONE]}}, "expected text"),
        (None, {"chat_template.json": "{"}, "no chat_template in it"),
        ([ONE], {}, "cannot be read as a tokenizer"),
        (3, {}, "expected a Jinja text"),
        ("", {}, "chat_template: plain"),
    ],
)
def test_what_is_no_template_is_one_error(
    folder: Path, value: object, files: dict[str, Any], told: str
) -> None:
    write(folder, files)
    if value is not None:
        set_template(folder, value)
    with pytest.raises(AlignError, match=told) as error:
        brought(folder)
    assert error.value.exit_code == 2
