"""The three forms in which a command names a model, and a hub id read from a cache."""

import json
from pathlib import Path

import pytest

from align.core.artifacts import write_manifest
from align.core.errors import ArtifactError
from align.core.references import find_model
from align.models.loading import model_folder


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for stage, kind in (("sft", "policy"), ("reward", "reward_model")):
        folder = Path("runs/quick", stage)
        (folder / "model").mkdir(parents=True)
        (folder / "model/config.json").write_text("{}")
        write_manifest(folder, {"kind": kind, "stage": stage, "spec_hash": "0"})
    Path("saved").mkdir()
    Path("saved/config.json").write_text("{}")


def test_the_three_forms():
    assert find_model("quick/sft") == Path("runs/quick/sft")
    assert find_model("runs/quick/sft") == Path("runs/quick/sft")
    assert find_model("saved") == Path("saved")
    assert find_model("sft", Path("runs/quick")) == Path("runs/quick/sft")
    assert str(find_model("Qwen/Qwen3-0.6B")) == "Qwen/Qwen3-0.6B"
    assert model_folder(Path("runs/quick/sft"), "policy") == Path("runs/quick/sft/model")
    assert model_folder(Path("saved"), "policy") == Path("saved")


def test_an_artifact_of_another_kind_and_a_missing_stage_are_refused():
    with pytest.raises(ArtifactError, match="'reward_model', expected a 'policy'"):
        model_folder(Path("runs/quick/reward"), "policy")
    with pytest.raises(ArtifactError, match="no such finished stage; finished are reward, sft"):
        find_model("quick/dpo")
    for name in ("nowhere", "runs/quick2", "a/b/c", "-a/b"):
        with pytest.raises(ArtifactError, match="no such model; expected RUN/STAGE"):
            find_model(name)


def test_a_missing_path_is_no_stage_of_a_run():
    for name in ("/no/such/model", "./saved2", "../saved", "./org/name", "~/model"):
        with pytest.raises(ArtifactError, match=f"^{name}: no such model; expected RUN/STAGE"):
            find_model(name)
    Path("rows").mkdir()
    with pytest.raises(ArtifactError, match=r"rows: no manifest\.json and no config\.json in it"):
        find_model(str(Path("rows").resolve()))
    with pytest.raises(ArtifactError, match="runs/quick has no such finished stage; finished are"):
        find_model("runs/quick/dpo")


def test_a_hub_id_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    # The layout of the hub client's cache: refs/<branch> names the folder of a commit.
    commit, cache = "0" * 40, tmp_path / "cache"
    snapshot = cache / "models--org--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (cache / "models--org--name/refs").mkdir()
    (cache / "models--org--name/refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder(find_model("org/name"), "policy") == snapshot
    with pytest.raises(ArtifactError, match="org/other: no such folder, and it cannot be loaded"):
        model_folder(find_model("org/other"), "policy")
