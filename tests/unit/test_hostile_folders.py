"""Damaged and hostile model folders and texts, at every command that reads or prints them."""

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from small_encoders import save_bert
from test_base_tokens import saved_model

from align.cli import cli, deep
from align.cli.data import _chat
from align.core import distributed
from align.core.artifacts import write_manifest
from align.core.card import Card, Line
from align.core.errors import ArtifactError
from align.data.token_view import Token, View, as_text
from align.recipe.load import load_recipe
from align.recipe.schema import EncoderStage, Recipe
from align.stages import encoder
from align.stages.base import StageContext
from align.stages.tools import chat, deep_check

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
HOSTILE = "\x1b]0;title\x07 \x9b2J \u202eright to left\r"


def set_config(folder: Path, **values: object) -> None:
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | values))


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:40])


def nan(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, file, metadata={"format": "pt"})


OF_TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "tokenizer cut": cut("tokenizer.json"),
    "tokenizer null": lambda folder: (folder / "tokenizer.json").write_text("null"),
    "settings a list": lambda folder: (folder / "tokenizer_config.json").write_text("[1]"),
    "config a list": lambda folder: (folder / "config.json").write_text("[]"),
}
OF_MODELS = OF_TOKENIZERS | {
    "config cut": cut("config.json"),
    "weights cut": cut("model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "own code": lambda folder: set_config(folder, model_type="evil", auto_map={"AutoModel": "e.E"}),
    "kind a list": lambda folder: set_config(folder, model_type=["bert"]),
    "class a number": lambda folder: set_config(folder, architectures=[1]),
    "size a text": lambda folder: set_config(folder, hidden_size="many"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("whole")
    save_bert(place / "bert")
    return {"bert": place / "bert", "policy": saved_model(place / "policy", tied=True)}


def one_line(error: BaseException) -> bool:
    return isinstance(error, ArtifactError) and "\n" not in str(error) and error.exit_code == 2


@pytest.mark.parametrize("damage", OF_TOKENIZERS)
def test_a_damaged_tokenizer_is_one_line_to_data_check(damage: str, whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole["policy"], tmp_path / "model")
    _chat(str(folder), None, Path("runs"))
    OF_TOKENIZERS[damage](folder)
    with pytest.raises(ArtifactError) as error:
        _chat(str(folder), None, Path("runs"))
    assert one_line(error.value)


@pytest.mark.parametrize("damage", [*OF_MODELS, "nan"])
def test_a_damaged_encoder_is_one_line(damage: str, whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole["bert"], tmp_path / "model")
    (OF_MODELS | {"nan": nan})[damage](folder)
    spec = EncoderStage(kind="encoder", path=str(folder))
    context = StageContext(Recipe(name="r", stages={"e": spec}), "e", tmp_path / "run", 0)
    with pytest.raises(ArtifactError) as error:
        encoder.prepare(spec, context)
    assert one_line(error.value)


@pytest.mark.parametrize("damage", OF_MODELS)
def test_a_damaged_policy_is_one_line_to_chat(
    damage: str, whole, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = shutil.copytree(whole["policy"], tmp_path / "stage" / "model")
    OF_MODELS[damage](folder)
    write_manifest(tmp_path / "stage", {"kind": "policy", "spec_hash": ""})
    monkeypatch.setattr(sys, "argv", ["chat", str(tmp_path / "stage")])
    with pytest.raises(SystemExit) as end:
        chat.main()
    said = [line for line in capsys.readouterr().err.splitlines() if str(folder) in line]
    assert end.value.code == 2
    assert len(said) == 1


def test_what_data_check_and_show_print_cannot_drive_the_terminal(tmp_path: Path) -> None:
    place = tmp_path / f"rows{HOSTILE.replace('/', '')}.jsonl"
    row = {"messages": [{"role": HOSTILE, "content": HOSTILE}]}
    place.write_text(json.dumps(row) + "\n" + HOSTILE + "\n")
    for words in (["--json"], []):
        said = CliRunner().invoke(cli, ["data", "check", str(place), *words]).output
        assert "title" in said
        assert not CONTROLS.search(said)
    shown = as_text(View("x", "row", (Token(0, HOSTILE, "trained"),)), colour=False).plain
    assert "title" in shown
    assert not CONTROLS.search(shown)


def test_what_check_prints_cannot_drive_the_terminal(monkeypatch) -> None:
    def found(recipe, *, show, **_):
        show(Card("sft", "sft", [Line("x", HOSTILE, HOSTILE, "fail", HOSTILE)]))
        return 1, HOSTILE

    said: list[str] = []
    monkeypatch.setattr(deep, "deep_check", found)
    monkeypatch.setattr(deep.typer, "echo", lambda text, **_: said.append(text))
    with pytest.raises(deep.typer.Exit):
        deep.check_deeply(load_recipe("quickstart"), {}, Path(), only=None)
    assert sum("title" in text for text in said) == 3
    assert not CONTROLS.search("".join(said))


def test_an_unforeseen_error_of_the_deep_check_is_one_line(monkeypatch, caplog) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    def broken() -> None:
        raise ValueError("boom")

    monkeypatch.setattr(distributed, "init_process_group", broken)
    monkeypatch.setattr(distributed, "end_process", end)
    argv = ["deep_check", "--resolved", "r", "--run-dir", "d", "--cards", "c"]
    monkeypatch.setattr(sys, "argv", argv)
    with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as ended:
        deep_check.main()
    assert ended.value.code == 1
    assert "align failed: ValueError: boom" in caplog.text
    assert "Traceback" not in caplog.text
