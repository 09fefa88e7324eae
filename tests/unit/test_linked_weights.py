"""The weights of an imported model are hard links: no copy, and nothing writes into the source."""

import argparse
import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
from alone import world_of_one
from small_encoders import save_bert
from test_base_tokens import bring_in, saved_model

from align.core.artifacts import cut_links, file_sha256, find_damage, hash_tree, read_manifest
from align.models import links
from align.models.loading import load_policy
from align.recipe.schema import EncoderStage, Recipe, TokenizerSpec
from align.stages import base
from align.stages.base import StageContext, prepare_and_train
from align.tuning.interpolate import write_interpolated

WEIGHTS = "model.safetensors"
PLAIN = TokenizerSpec(pad_token="<pad>", chat_template="plain")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved_model(tmp_path / "in", tied=True)


def state_of(folder: Path) -> tuple[str, int, int]:
    """Return content, mode and modification time of the weights."""
    found = (folder / WEIGHTS).stat()
    return file_sha256(folder / WEIGHTS), found.st_mode, found.st_mtime_ns


def is_linked(one: Path, other: Path) -> bool:
    return (one / WEIGHTS).stat().st_ino == (other / WEIGHTS).stat().st_ino


@pytest.mark.parametrize("tied", [True, False])
def test_an_unchanged_model_is_linked_and_equal_to_a_saved_one(tmp_path: Path, tied: bool) -> None:
    source = saved_model(tmp_path / "in", tied=tied)
    model_dir, card = bring_in(source, tmp_path, PLAIN)
    assert is_linked(source, model_dir)
    assert "linked to" in next(x["value"] for x in card["lines"] if x["name"] == "weights")
    # What save_pretrained would have written beside the weights.
    other = tmp_path / "saved"
    model = load_policy(model_dir, dtype="float32")
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(other)
    for name in ("config.json", "generation_config.json"):
        assert (model_dir / name).read_text() == (other / name).read_text(), name
    # The manifest has the hash of the bytes, linked or not.
    records = hash_tree(model_dir)
    assert records[WEIGHTS]["sha256"] == file_sha256(source / WEIGHTS)


def changed(name: str, source: Path) -> TokenizerSpec:
    weights = load_file(source / WEIGHTS)
    if name == "float16":
        weights = {k: v.half() for k, v in weights.items()}
    elif name == "mixed":  # as models are stored whose routers or norms stay in float32
        weights = {k: v if "norm" in k else v.bfloat16() for k, v in weights.items()}
    elif name == "prefix":
        weights = {f"_orig_mod.{k}": v for k, v in weights.items()}
    elif name == "tied weight twice":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    elif name == "new tokens":
        return TokenizerSpec(pad_token="<pad>", chat_template="chatml")
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
    return PLAIN


CHANGES = ["float16", "mixed", "prefix", "tied weight twice", "new tokens"]


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_changes_is_written_anew(source: Path, tmp_path: Path, name: str) -> None:
    tokenizer = changed(name, source)
    before = state_of(source)
    model_dir, card = bring_in(source, tmp_path, tokenizer)
    assert not is_linked(source, model_dir)
    assert "MiB written as float32" in next(
        x["value"] for x in card["lines"] if x["name"] == "weights"
    )
    assert state_of(source) == before
    # No value is rounded: the parts in 16 bits are those of the files.
    files = {k.removeprefix("_orig_mod."): v for k, v in load_file(source / WEIGHTS).items()}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    for key, value in model.state_dict().items():
        if key in files:
            assert torch.equal(value[: len(files[key])], files[key].float()), key


@pytest.mark.parametrize("named", ["bfloat16", "float32"])
def test_bfloat16_weights_are_linked_whatever_the_config_names(
    source: Path, tmp_path: Path, named: str
) -> None:
    weights = {k: v.bfloat16() for k, v in load_file(source / WEIGHTS).items()}
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": named}))
    model_dir, _ = bring_in(source, tmp_path, PLAIN)
    assert is_linked(source, model_dir)
    assert json.loads((model_dir / "config.json").read_text())["dtype"] == "bfloat16"


def test_float32_weights_stay_so_if_the_config_names_bfloat16(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    model_dir, _ = bring_in(source, tmp_path, PLAIN)
    assert is_linked(source, model_dir)
    assert json.loads((model_dir / "config.json").read_text())["dtype"] == "float32"


def test_shards_are_linked_with_their_index(tmp_path: Path) -> None:
    source = saved_model(tmp_path / "in", tied=False)
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / WEIGHTS).unlink()
    model.save_pretrained(source, max_shard_size="20KB")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 1
    model_dir, _ = bring_in(source, tmp_path, PLAIN)
    assert [p.stat().st_ino for p in sorted(model_dir.glob("*.safetensors"))] == [
        p.stat().st_ino for p in shards
    ]
    again = AutoModelForCausalLM.from_pretrained(model_dir)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_without_links_the_weights_are_copied_and_the_size_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(links.os, "link", refuse)
    model_dir, card = bring_in(source, tmp_path, PLAIN)
    assert not is_linked(source, model_dir)
    assert file_sha256(model_dir / WEIGHTS) == file_sha256(source / WEIGHTS)
    assert "1 MiB copied to " in next(x["value"] for x in card["lines"] if x["name"] == "weights")


def test_a_symbolic_link_of_a_cache_is_followed(source: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    shutil.move(source / WEIGHTS, blob)
    (source / WEIGHTS).symlink_to(blob)
    model_dir, _ = bring_in(source, tmp_path, PLAIN)
    assert not (model_dir / WEIGHTS).is_symlink()
    assert (model_dir / WEIGHTS).stat().st_ino == blob.stat().st_ino


def run(recipe: Path, folder: Path, **flags: Any) -> None:
    given = {"resolved": None, "recipe": str(recipe), "stage": "base", "overrides": []}
    given |= {"runs": folder.parent, "run_dir": str(folder), "force": False} | flags
    assert base.run_stage("base", argparse.Namespace(**given)) == 0


def test_running_again_with_other_settings_does_not_write_into_the_source(
    source: Path, tmp_path: Path
) -> None:
    (source / WEIGHTS).chmod(0o400)
    before = state_of(source)
    recipe = tmp_path / "r.yaml"
    plan = {"path": str(source), "tokenizer": {"pad_token": "<pad>", "chat_template": "plain"}}
    stages = {"base": {"kind": "base", **plan}}
    recipe.write_text(json.dumps({"name": "r", "stages": stages}))
    with world_of_one():
        run(recipe, tmp_path / "run")
        model_dir = tmp_path / "run" / "base" / "model"
        assert is_linked(source, model_dir)
        assert state_of(source) == before
        run(recipe, tmp_path / "run", overrides=["stages.base.dtype=bfloat16"], force=True)
    assert not is_linked(source, model_dir)
    assert load_file(model_dir / WEIGHTS)["model.norm.weight"].dtype is torch.bfloat16
    assert state_of(source) == before
    out = tmp_path / "run" / "base"
    assert find_damage(out, read_manifest(out), whole=True) == []


def test_only_shared_files_of_the_model_are_cut(tmp_path: Path) -> None:
    for name in ("model", "adapter", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own").write_text("own")
        (tmp_path / "elsewhere" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "elsewhere" / name).write_text("shared")
        os.link(tmp_path / "elsewhere" / name, tmp_path / name / "shared")
    cut_links(tmp_path)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("*/*"))
    elsewhere = [f"elsewhere/{name}" for name in ("adapter", "best", "model")]
    assert left == sorted([*elsewhere, "adapter/own", "model/own", "best/own", "best/shared"])


def brought_encoder(path: Path, out: Path) -> tuple[Path, dict[str, str]]:
    """Run the encoder stage; give the model that it leaves, and its card."""
    spec = EncoderStage(kind="encoder", path=str(path))
    (out / "encoder").mkdir(parents=True)
    recipe = Recipe(name="r", stages={"encoder": spec})
    prepare_and_train(spec, StageContext(recipe, "encoder", out, 0))
    card = json.loads((out / "encoder" / "preflight.json").read_text())
    return out / "encoder" / "model", {x["name"]: x["value"] for x in card["lines"]}


@pytest.mark.parametrize("pooler", [True, False])
def test_an_encoder_is_linked_and_equal_to_a_saved_one(tmp_path: Path, pooler: bool) -> None:
    source = Path(save_bert(tmp_path / "in", pooler=pooler))
    before = state_of(source)
    model_dir, card = brought_encoder(source, tmp_path / "out")
    assert is_linked(source, model_dir)
    assert "linked to" in card["weights"]
    assert state_of(source) == before
    assert json.loads((model_dir / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    # A second run replaces the link and leaves the source as it is.
    shutil.rmtree(tmp_path / "out")
    lacking = {k: v for k, v in load_file(source / WEIGHTS).items() if "pooler" not in k}
    lacking["strange"] = torch.zeros(2)
    save_file(lacking, source / WEIGHTS, metadata={"format": "pt"})
    model_dir, card = brought_encoder(source, tmp_path / "out")
    assert not is_linked(source, model_dir)
    assert "written as float32" in card["weights"]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_end_of_a_merge_is_linked_and_its_sources_survive_another(tmp_path, alpha):
    pair = [saved_model(tmp_path / name, tied=True) for name in ("a", "b")]
    out, source = tmp_path / "out", pair[int(alpha)]
    before = state_of(source)
    write_interpolated(*pair, alpha=alpha, out=out)
    assert is_linked(source, out)
    # Text files are copies, which may be edited.
    assert (source / "config.json").stat().st_ino != (out / "config.json").stat().st_ino
    write_interpolated(*pair, alpha=0.5, out=out)
    assert not is_linked(source, out)
    assert state_of(source) == before


def test_weights_that_the_files_lack_are_not_linked(tmp_path: Path) -> None:
    state = {"a": torch.ones(3), "b": torch.zeros(3)}
    save_file({"a": torch.ones(3)}, tmp_path / WEIGHTS)
    assert links.unchanged_files(tmp_path, state) == []
    assert links.unchanged_files(tmp_path, {"a": state["a"]}) == [tmp_path / WEIGHTS]


def test_saving_over_links_leaves_their_source_as_it_is(source: Path, tmp_path: Path) -> None:
    before = state_of(source)
    out = tmp_path / "stage" / "model"
    links.take_over([source / WEIGHTS], out)
    assert is_linked(source, out)
    model = AutoModelForCausalLM.from_pretrained(source)
    state = {name: tensor + 1.0 for name, tensor in model.state_dict().items()}
    links.save_model(model, out, state=state, source=None)
    assert not is_linked(source, out)
    assert state_of(source) == before


@pytest.mark.parametrize("linked", [True, False])
def test_saving_over_shards_leaves_one_set_of_weights(tmp_path: Path, linked: bool) -> None:
    source = tmp_path / "in"
    model = AutoModelForCausalLM.from_pretrained(saved_model(tmp_path / "whole", tied=True))
    model.save_pretrained(source, max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    out = tmp_path / "stage" / "model"
    files = links.unchanged_files(source, model.state_dict())
    links.take_over(files, out)
    assert len(list(out.iterdir())) == len(files) > 2
    if not linked:
        shutil.copytree(out, tmp_path / "copy")
        shutil.rmtree(out)
        (tmp_path / "copy").rename(out)
    state = {name: tensor + 1.0 for name, tensor in model.state_dict().items()}
    links.save_model(model, out, state=state, source=None)
    assert {path.name for path in out.glob("*safetensors*")} == {WEIGHTS}
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
