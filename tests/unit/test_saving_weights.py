"""Weights are written as they come: the files of huggingface_hub, never all weights in memory."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from align.core import storage
from align.models import saving
from align.models.saving import write_weights

LIMIT = 4000
NUM = 103
"""Elements of the tensors that are counted, which no other test has."""


def weights() -> dict[str, Tensor]:
    """Return tensors of three dtypes; one is larger than a file, one is a part of another."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(600, generator=generator)
    return {
        "b.weight": buffer[100:350].view(50, 5),
        "a.weight": torch.randn(9, 7, generator=generator).t(),
        "large": torch.randn(2000, generator=generator),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "many": torch.randn(900, generator=generator),
        "count": torch.arange(3),
        "scale": torch.tensor(2.0),
    }


@pytest.mark.parametrize("limit", [LIMIT, 10**9])
def test_files_are_those_of_huggingface_hub(tmp_path: Path, monkeypatch, limit: int) -> None:
    monkeypatch.setattr(saving, "FILE_BYTES", limit)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    write_weights(weights().items(), ours)
    whole = {name: tensor.clone() for name, tensor in weights().items()}
    save_torch_state_dict(whole, theirs, metadata={"format": "pt"}, max_shard_size=limit)
    found = {path.name: path.read_bytes() for path in ours.iterdir()}
    expected = {path.name: path.read_bytes() for path in theirs.iterdir()}
    if limit == 10**9:
        assert found == expected
        return
    # huggingface_hub puts the tensors after a large one into the file before it.
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["metadata"] == json.loads(expected["model.safetensors.index.json"])["metadata"]
    assert read(ours) == read(theirs)


def read(folder: Path) -> dict[str, list]:
    """Return all tensors that transformers would find, by the index."""
    from safetensors.torch import load_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {path.name for path in folder.glob("*.safetensors")} == set(index.values())
    found = {name: load_file(folder / file)[name] for name, file in index.items()}
    return {name: [str(x.dtype), x.tolist()] for name, x in sorted(found.items())}


def test_at_most_one_file_and_one_tensor_are_in_memory(tmp_path: Path, monkeypatch) -> None:
    size = 8 * NUM
    monkeypatch.setattr(saving, "FILE_BYTES", 4 * size)
    most = 0

    # Other tests may have left tensors of their own.
    def is_one(x: Tensor) -> bool:
        return x.dtype == torch.float64 and x.shape == (NUM,)

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for number in range(40):
            yield str(number), torch.full((NUM,), float(number), dtype=torch.float64)
            most = max(most, sum(type(x) is Tensor and is_one(x) for x in gc.get_objects()))

    write_weights(stream(), tmp_path)
    assert len(list(tmp_path.glob("model-*-of-00010.safetensors"))) == 10
    # Four of the file, and the one that was yielded last.
    assert most <= 5


def test_files_of_an_earlier_model_are_removed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "model-00003.part").write_bytes(b"left by a process that was killed")
    monkeypatch.setattr(saving, "FILE_BYTES", LIMIT)
    write_weights(weights().items(), tmp_path)
    assert len(list(tmp_path.iterdir())) > 2
    monkeypatch.setattr(saving, "FILE_BYTES", 10**9)
    write_weights(weights().items(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_waited_for_and_keeps_no_part_of_a_file(tmp_path: Path, monkeypatch) -> None:
    write, tries = saving.save_file, []

    def full_once(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        tries.append(sorted(p.name for p in tmp_path.iterdir()))
        if len(tries) == 1:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata=metadata)

    monkeypatch.setattr(saving, "save_file", full_once)
    monkeypatch.setattr(storage, "POLL_S", 0.0)
    write_weights(weights().items(), tmp_path)
    assert tries == [[], []]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
