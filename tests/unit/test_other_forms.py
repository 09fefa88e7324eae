"""Models in the forms of other programs, and files without weights, are named as what they are."""

import json
from pathlib import Path

import pytest

from align.core.errors import ArtifactError
from align.core.model_folder import check_files, refuse_other_form

INDEX = "model.safetensors.index.json"


def folder(place: Path, *files: str, config: bool = True) -> Path:
    if config:
        files = (*files, "config.json")
    for name in files:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if name.endswith(".json") else "weights")
    return place


def told(path: Path) -> str:
    with pytest.raises(ArtifactError) as error:
        check_files(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        (("llama-Q4_K_M.gguf",), "It has llama-Q4_K_M.gguf: quantized for inference"),
        (("consolidated.00.pth",), "It has consolidated.00.pth: Meta's own form"),
        (("pytorch_model_fsdp_0/__0_0.distcp",), "It has __0_0.distcp: shards of FSDP"),
        (("__0_0.distcp",), "shards of FSDP; merge them: accelerate merge-weights"),
        (("global_step9/mp_rank_00_model_states.pt", "latest"), "shards of DeepSpeed"),
        (("model.onnx",), "It has model.onnx: for inference"),
        (("tokenizer.json",), "no weights (model.safetensors) beside config.json"),
    ],
)
def test_weights_of_another_form_are_named(tmp_path: Path, files: tuple[str, ...], what: str):
    assert what in told(folder(tmp_path, *files))
    folder(tmp_path, "model.safetensors")
    check_files(str(tmp_path))


def test_a_file_in_place_of_its_folder(tmp_path: Path):
    folder(tmp_path, "model.safetensors", "m.gguf")
    line = told(tmp_path / "model.safetensors")
    assert f"a file of the folder {tmp_path}; use that" in line
    assert "a file, quantized for inference; import the weights" in told(tmp_path / "m.gguf")


def test_a_folder_of_checkpoints_names_them(tmp_path: Path):
    for step in (100, 200):
        folder(tmp_path / f"checkpoint-{step}", "model.safetensors")
    assert "Folders with a model in it: checkpoint-100, checkpoint-200" in told(tmp_path)
    refuse_other_form(str(tmp_path / "checkpoint-100"))


def test_weights_without_a_configuration_and_an_adapter(tmp_path: Path):
    line = told(folder(tmp_path / "a", "model.safetensors", config=False))
    assert "weights without a configuration; copy the model's config.json" in line
    assert "an adapter; expected" in told(
        folder(tmp_path / "b", "adapter_config.json", config=False)
    )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "shard"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file. Copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
def test_a_file_without_weights_in_it(tmp_path: Path, name: str, content: bytes, what: str):
    folder(tmp_path, name)
    if name == "shard":
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "shard"}}))
    check_files(str(tmp_path))
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name}: " in told(tmp_path)
    assert what in told(tmp_path)


def test_missing_shards_of_older_files_count_if_they_are_read(tmp_path: Path):
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    folder(tmp_path, names[0])
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert f"1 of 2 weight files are missing: {names[1]}" in told(tmp_path)
    # As downloads without the older files leave it.
    folder(tmp_path, "model.safetensors")
    check_files(str(tmp_path))
