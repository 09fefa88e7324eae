"""Reuse the weight files of an imported model without a copy, as hard links."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from align.core.artifacts import fsync_directory
from align.core.model_folder import INDEX, SINGLE
from align.core.storage import MIB, device_of

log = logging.getLogger(__name__)


def unchanged_files(folder: Path, state: Mapping[str, Tensor]) -> list[Path]:
    """Return the files of a model folder if their weights are those of ``state``, bit by bit.

    Args:
        folder: the folder that the model was loaded from.
        state: what would be saved; a tied weight may be in it under several names.

    Returns:
        The weight files, and the index if there are several. Empty if anything differs: names,
        number format, added tokens, a prefix that was removed, or another file format.
    """
    files = _weight_files(folder)
    if not files:
        return []
    seen: dict[int, str] = {}  # storage -> the first name that has it
    for name, saved in _tensors(files):
        loaded = state.get(name)
        if loaded is None or loaded.dtype != saved.dtype or not torch.equal(loaded.cpu(), saved):
            return []
        # Stored twice: the model is saved with one of them.
        if loaded.data_ptr() in seen:
            return []
        seen[loaded.data_ptr()] = name
    if any(tensor.data_ptr() not in seen for tensor in state.values()):
        return []
    return files if len(files) == 1 else [*files, folder / INDEX]


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        # With both, it depends on the reader which is loaded.
        return [] if index.exists() else [single]
    if not index.is_file():
        return []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names)) if name.endswith(".safetensors")]


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no mapping
                yield name, opened.get_tensor(name)


def take_over(files: list[Path], out: Path) -> str:
    """Link files into a folder, or copy them if links are not possible.

    A link shares the file with its source. Nothing here writes into it: whoever replaces the file
    removes the name first.

    Returns:
        What was done, for the preflight.
    """
    out.mkdir(parents=True, exist_ok=True)
    _remove_weights(out)
    size = sum(file.stat().st_size for file in files)
    copied = sum(file.stat().st_size for file in files if not link_or_copy(file, out / file.name))
    fsync_directory(out)
    if copied:
        return f"{_mib(copied)} MiB copied to {device_of(out)}"
    return f"linked to {files[0].parent}, {_mib(size)} MiB not copied"


def _remove_weights(folder: Path) -> None:
    """Remove the weight files of an earlier attempt, which may be links to those of a source."""
    for old in (*folder.glob("*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> bool:
    """Link a file, or copy it where that is not possible; return whether it was linked."""
    real = source.resolve()  # the hub's cache has symbolic links
    try:
        os.link(real, target)
    except OSError as error:  # another device, or links are not permitted
        size = _mib(real.stat().st_size)
        log.info("%s: copied, %s MiB (no hard link: %s)", source, size, error.strerror)
        shutil.copyfile(real, target)
        return False
    return True


def save_model(
    model: PreTrainedModel, out: Path, *, state: Mapping[str, Tensor], source: Path | None
) -> str:
    """Save a model; its weight files are links to those of its source if they have these weights.

    Args:
        model: to save. out: its folder, ``model/`` of a stage.
        state: the weights to save.
        source: folder that the model was loaded from; None if there is none.

    Returns:
        What was done, for the preflight.
    """
    files = [] if source is None else unchanged_files(source, state)
    if not files:
        # transformers leaves an index where it writes one file, and writes into it otherwise.
        _remove_weights(out)
        model.save_pretrained(str(out), state_dict=dict(state))
        size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        return f"{_mib(size)} MiB written as {str(model.dtype).removeprefix('torch.')}"
    told = take_over(files, out)
    # As save_pretrained does.
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(str(out))
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(str(out))
    return told


def _mib(size: int) -> str:
    return f"{-(-size // MIB):,}"
