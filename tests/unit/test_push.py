"""The model card, and its upload with the model to a local hub over HTTP."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from export_models import edit, make_run
from fake_hub import fake_hub

from align.core.artifacts import read_manifest, write_manifest
from align.core.errors import ArtifactError
from align.core.model_card import card_text, evaluations_of, write_card
from align.export.push import plan_push
from align.stages.tools.export import export
from align.stages.tools.push import listing

TOKEN = "hf_" + "q" * 34
MANIFEST: dict[str, Any] = {
    "kind": "policy",
    "stage": "dpo",
    "stage_kind": "dpo",
    "spec": {"kind": "dpo", "tuning": {"method": "lora"}, "data": [{"path": "/home/me/p.jsonl"}]},
    "spec_hash": "0123456789abcdef0123",
    "seed": 3,
    "inputs": {"init": {"path": "sft"}},
    "identity": {"hub": {"org/pairs": "c0ffee"}},
    "data": [{"path": "/home/me/p.jsonl", "rows": 8, "sha256": "ab" * 32}],
    "metrics": {"eval/accuracy": 0.625, "tokens/per_s": 123.4, "time/step_s": 0.5},
}


def command(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "align", "push", *words]
    full = os.environ | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"} | env
    return subprocess.run(argv, env=full, text=True, capture_output=True, timeout=300, check=False)


def test_card_has_metadata_that_the_hub_reads(tmp_path):
    start = tmp_path / "sft" / "model"
    start.mkdir(parents=True)
    (start / "README.md").write_text("---\nbase_model: org/base\nlicense: mit\ntags: [x]\n---\n")
    (tmp_path / "dpo" / "model").mkdir(parents=True)
    write_card(tmp_path / "dpo", MANIFEST, lambda name: tmp_path / name)
    card = ModelCard.load(tmp_path / "dpo" / "model" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "datasets": ["org/pairs"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["align", "dpo", "lora"],
    }
    assert "| eval/accuracy | 0.625 |" in card.text
    assert "| p.jsonl | 8 | abababababababab |" in card.text
    assert "/home/me" not in card.text  # no folder of this machine


def test_equal_runs_write_equal_cards():
    slow = {**MANIFEST, "metrics": {**MANIFEST["metrics"], "tokens/per_s": 1.0, "time/step_s": 9}}
    assert card_text(MANIFEST, {}) == card_text(slow, {})
    other = {**MANIFEST, "metrics": {"eval/accuracy": 0.5}}
    assert card_text(MANIFEST, {}) != card_text(other, {})


@pytest.mark.parametrize("path", ["org/base", "local"])
def test_base_model_is_a_hub_id_or_left_out(tmp_path, path):
    (tmp_path / "base" / "model").mkdir(parents=True)
    name = path
    if path == "local":
        name = str(tmp_path / "local")
        (tmp_path / "local").mkdir()
        (tmp_path / "local" / "README.md").write_text("---\nlicense: apache-2.0\n---\nText\n")
    manifest = {**MANIFEST, "stage_kind": "base", "spec": {"path": name}, "inputs": {}}
    write_card(tmp_path / "base", manifest, Path)
    data = ModelCard.load(tmp_path / "base" / "model" / "README.md").data
    assert data.base_model == ("org/base" if path == "org/base" else None)
    assert data.license == (None if path == "org/base" else "apache-2.0")


def test_evaluations_of_the_run_are_listed_with_intervals(tmp_path):
    (tmp_path / "evaluate").mkdir()
    block = {"models": {"dpo": {"win_rate": [0.7938, 0.7645, 0.821], "kl": None}, "sft": {}}}
    (tmp_path / "evaluate" / "summary.json").write_text(json.dumps({"tasks": {"held": block}}))
    rows = evaluations_of(tmp_path, "dpo")
    assert rows == [("held", "win_rate", "0.7938", "0.7645 to 0.821")]
    assert "| held | win_rate | 0.7938 | 0.7645 to 0.821 |" in card_text(
        MANIFEST, {}, evaluations=rows
    )


def test_push_uploads_the_model_and_its_card_over_http(tmp_path):
    stage = make_run(tmp_path / "run")
    with fake_hub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        done = command(str(stage), "org/tiny", "--private", "--revision", "v1", **env)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        assert hub.repos == {"org/tiny": True}
        assert f"Bearer {TOKEN}" in hub.tokens
        found = hub.files["org/tiny", "v1"]
        model = stage / "model"
        assert found["model.safetensors"] == (model / "model.safetensors").read_bytes()
        assert found["tokenizer.json"] == (model / "tokenizer.json").read_bytes()
        assert b"tags:\n- align\n- sft\n- lora\n" in found["README.md"]
        assert set(found) == {p.name for p in model.iterdir()} | {"README.md"}
        hub.refuse = True
        refused = command(str(stage), "org/tiny", **env)
    assert refused.returncode == 2
    assert "not uploaded" in refused.stderr
    assert "hf auth login" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert TOKEN not in refused.stderr


def test_dry_run_lists_files_and_sizes_and_asks_no_server(tmp_path):
    stage = make_run(tmp_path / "run")
    done = command(str(stage), "org/tiny", "--dry-run", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    size = (stage / "model" / "model.safetensors").stat().st_size
    assert f"{size / 1024:.1f} KiB  model.safetensors" in done.stdout


def test_states_of_the_training_are_never_uploaded(tmp_path):
    folder = make_run(tmp_path / "run").parent / "imported"
    for name in (
        "optimizer.pt",
        "optimizer.safetensors",
        "trainer_state.json",
        "training_args.bin",
    ):
        (folder / name).write_text("{}")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "config.json").write_text("{}")
    uploads, left_out = plan_push(folder)
    names = {upload.name for upload in uploads}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("optimizer" in n or "train" in n or "checkpoint" in n for n in names)
    assert set(left_out) == {
        "optimizer.pt",
        "optimizer.safetensors",
        "trainer_state.json",
        "training_args.bin",
        "checkpoint-3/config.json",
    }
    assert listing(uploads, left_out)[-1].startswith("not uploaded: checkpoint-3/config.json")


def test_weights_that_are_not_safetensors_are_not_left_behind(tmp_path):
    folder = make_run(tmp_path / "run").parent / "imported"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    told = r"found only pytorch_model\.bin; expected weights as \.safetensors.*save_pretrained"
    with pytest.raises(ArtifactError, match=told):
        plan_push(folder)
    with pytest.raises(ArtifactError, match=told):
        export(folder, tmp_path / "out")
    # What the line says to do, and both go through.
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(folder)
    assert "model.safetensors" in {upload.name for upload in plan_push(folder)[0]}
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ArtifactError, match="no weights"):
        plan_push(folder)


def test_an_adapter_names_a_base_that_others_have(tmp_path, monkeypatch):
    stage = make_run(tmp_path / "run")
    export(stage, tmp_path / "out", name="adapter")
    with pytest.raises(
        ArtifactError, match=r"imported, a folder of this machine\..*--base ORG/NAME"
    ):
        plan_push(tmp_path / "out")
    # A relative folder has the form of a hub id; from elsewhere the same text is one.
    monkeypatch.chdir(tmp_path)
    export(stage, Path("adapter"), name="adapter", base="run/imported")
    with pytest.raises(ArtifactError, match="base model is run/imported, a folder"):
        plan_push(Path("adapter"))
    (tmp_path / "run" / "imported").rename(tmp_path / "elsewhere")
    assert "adapter_config.json" in {upload.name for upload in plan_push(Path("adapter"))[0]}


@pytest.mark.parametrize("leak", ["variable", "token", "key"])
def test_file_with_a_secret_is_not_uploaded(tmp_path, monkeypatch, leak):
    folder = make_run(tmp_path / "run").parent / "imported"
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    text = {
        "variable": "correct-horse-battery",
        "token": TOKEN,
        "key": "-----BEGIN RSA PRIVATE KEY-----",
    }[leak]
    edit(folder / "generation_config.json", note=text)
    with pytest.raises(ArtifactError, match=r"generation_config\.json contains") as error:
        plan_push(folder)
    assert text not in str(error.value)


def test_damaged_stage_and_wrong_name_are_refused(tmp_path):
    stage = make_run(tmp_path / "run")
    done = command(str(stage), "tiny", "--dry-run")
    assert done.returncode == 2
    assert "expected ORG/NAME" in done.stderr
    (stage / "model" / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        plan_push(stage)
    manifest = {k: v for k, v in read_manifest(stage).items() if k != "files"}
    shutil.rmtree(stage / "model")
    write_manifest(stage, manifest | {"kind": "evaluation"})
    with pytest.raises(ArtifactError, match="no model to export"):
        plan_push(stage)
