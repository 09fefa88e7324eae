"""Interpolate the weights of two saved models, one tensor at a time."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from align.core.errors import ArtifactError
from align.models.links import link_or_copy

INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"


def check_alike(base: Path, tuned: Path) -> None:
    """Raise unless two models have the same weights.

    Raises:
        ArtifactError: names, shapes or the tie of head and embeddings differ.
    """
    if _tied(base) != _tied(tuned):
        raise ArtifactError(
            f"{base} and {tuned}: the head is tied to the embeddings in only one of them. "
            "Interpolate models of one architecture."
        )
    first, second = _shapes(base), _shapes(tuned)
    alone = sorted(first.keys() ^ second.keys())
    if alone:
        raise ArtifactError(
            f"{base} and {tuned}: {len(alone)} weights exist in only one of them, such as "
            f"{alone[0]}. Interpolate a model with one that was fine-tuned from it."
        )
    for name, shape in first.items():
        if shape != second[name]:
            raise ArtifactError(
                f"{name}: shape {shape} in {base}, {second[name]} in {tuned}; expected equal ones"
            )


def interpolated(base: Path, tuned: Path, alpha: float) -> Iterator[tuple[str, Tensor]]:
    """Yield (1 - alpha) * base + alpha * tuned, computed in float32, in the dtype of ``tuned``.

    At most one tensor of each model is in memory at a time. Alpha 0 and 1 reproduce ``base`` and
    ``tuned`` bit for bit.

    Reference:
        arXiv:2109.01903 eq. 1.
    """
    for file in weight_files(tuned):
        yield from _file(base, tuned, name=file.name, alpha=alpha).items()


def write_interpolated(base: Path, tuned: Path, *, alpha: float, out: Path) -> None:
    """Write an interpolated model folder, one file at a time; alpha 0 and 1 link the weights."""
    shutil.rmtree(out, ignore_errors=True)
    if alpha in (0.0, 1.0):
        source = base if alpha == 0.0 else tuned
        weights = {file.name for file in weight_files(source)}
        shutil.copytree(source, out, ignore=lambda _, names: weights & set(names))
        for name in sorted(weights):
            link_or_copy(source / name, out / name)
        return
    # Configuration and tokenizer are those of the tuned model, only the weights are new.
    weights = {file.name for file in weight_files(tuned)} | {INDEX}
    shutil.copytree(tuned, out, ignore=lambda _, names: weights & set(names))
    places: dict[str, str] = {}
    total = 0
    for file in weight_files(tuned):
        tensors = dict(_file(base, tuned, name=file.name, alpha=alpha))
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
        total += sum(x.nbytes for x in tensors.values())
    # A sharded model needs an index of its new files.
    if (tuned / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def mix(a: Tensor, b: Tensor, alpha: float, *, name: str) -> Tensor:
    """Return (1 - alpha) * a + alpha * b, computed in float32, in the dtype of ``b``.

    Raises:
        ArtifactError: two non-float tensors differ.
    """
    if not b.is_floating_point():
        if not torch.equal(a, b):
            raise ArtifactError(f"{name}: {b.dtype} values differ and cannot be interpolated")
        return b
    if alpha in (0.0, 1.0):  # 0 * a + b would turn -0.0 in b into 0.0
        return (b if alpha == 1.0 else a).to(b.dtype)
    return ((1.0 - alpha) * a.float() + alpha * b.float()).to(b.dtype)


def weight_files(folder: Path) -> list[Path]:
    """Return the files that contain a model's weights."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ArtifactError(f"{folder}: no *.safetensors; expected a model saved by a stage")
    return found


def _file(base: Path, tuned: Path, *, name: str, alpha: float) -> dict[str, Tensor]:
    """Interpolate the weights in one file of ``tuned``; in ``base`` they may be in other files."""
    places = {key: file for file in weight_files(base) for key in _names(file)}
    # A tied head follows the embeddings; interpolating it again would be redundant.
    skip = HEAD if _tied(tuned) else None
    found: dict[str, Tensor] = {}
    with safe_open(tuned / name, framework="pt") as mine:
        for key in (key for key in mine.keys() if key != skip):  # noqa: SIM118 (not a dict)
            with safe_open(places[key], framework="pt") as other:
                found[key] = mix(other.get_tensor(key), mine.get_tensor(key), alpha, name=key)
    return found


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _shapes(folder: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    if _tied(folder):
        found.pop(HEAD, None)
    return found


def _tied(folder: Path) -> bool:
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).get_text_config()
    return bool(config.tie_word_embeddings)
