"""Write the weights of a model as they come: at most one file's tensors are in memory."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from align.core import distributed
from align.core.storage import MIB, write_patiently

FILE_BYTES = 10**9
"""Largest size of a file; a tensor that is larger has one of its own."""
_INDEX = "model.safetensors.index.json"
_PART = "model-{:05d}.part"


def write_weights(named: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Write tensors into safetensors files, and an index if there are several; wait for space.

    The files have the names that transformers reads. Those of an earlier model are removed.

    Args:
        named: names and tensors of a model; each is copied before the next one is asked for.
        directory: exists.
    """
    for old in (*directory.glob("model*.safetensors"), *directory.glob("model-*.part")):
        old.unlink()
    (directory / _INDEX).unlink(missing_ok=True)
    files: list[list[str]] = []
    tensors: dict[str, Tensor] = {}
    total = held = 0
    for name, tensor in named:
        size = tensor.numel() * tensor.element_size()
        if tensors and held + size > FILE_BYTES:
            files.append(_write(tensors, directory / _PART.format(len(files) + 1)))
            tensors, held = {}, 0
        # Gathered memory is freed, and a parameter may be a part of a larger buffer.
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        total, held = total + size, held + size
    files.append(_write(tensors, directory / _PART.format(len(files) + 1)))
    _name_files(files, directory, total=total)


def _write(tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    """Write one file and return the names in it."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def write() -> None:
        try:
            save_file(dict(tensors), path, metadata={"format": "pt"})
        except Exception:
            # A part of it that did not fit does not stay on the full disk.
            path.unlink(missing_ok=True)
            raise

    write_patiently(write, folder=path.parent, needed=size, stop=distributed.was_asked)
    return list(tensors)


def _name_files(files: list[list[str]], directory: Path, *, total: int) -> None:
    """Rename the parts now that their number is known, and write the index."""
    found: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        many = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file = f"model{many}.safetensors"
        (directory / _PART.format(number)).rename(directory / file)
        found |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total, "format": "pt"}, "weight_map": found}
        write_patiently(
            lambda: (directory / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8"),
            folder=directory,
            needed=MIB,
            stop=distributed.was_asked,
        )
