"""Write merged weights or an adapter as safetensors, and verify every tensor against the source."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from align.core.errors import ArtifactError
from align.export.source import Source, base_model
from align.models.loading import load_tokenizer, saved_weights
from align.tuning.files import CONFIG, WEIGHTS, refuse_unmerged

SHARD_BYTES = 4 * 2**30
_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "README.md", "*.tmp")
_OWN = ("BOTTLENECK", "LOREFT")
"""Adapters of the suite's own kinds, which other tools cannot load."""


def write_merged(source: Source, folder: Path, *, dtype: str) -> None:
    """Write the whole model in a dtype, with its configuration and tokenizer."""
    from huggingface_hub import save_torch_state_dict

    refuse_unmerged(source.model_dir, "align export --format model (use --format adapter)")
    shutil.copytree(
        source.model_dir, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_NOT_COPIED)
    )
    kind = getattr(torch, dtype)
    state = {name: rounded(tensor, kind) for name, tensor in saved_weights(source.model_dir)}
    # The suite reads a reward model from one file.
    shard = SHARD_BYTES if source.kind != "reward_model" else 2**62
    save_torch_state_dict(state, str(folder), metadata={"format": "pt"}, max_shard_size=shard)
    _set_dtype(folder / "config.json", dtype)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another dtype; integer tensors are unchanged."""
    return tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor


def _set_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = dtype
    config.pop("torch_dtype", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_adapter(source: Source, folder: Path, *, base: str | None) -> None:
    """Write the stage's adapter in peft's format with the name of its base, and the tokenizer.

    Args:
        source: a stage that trained an adapter.
        folder: the output folder.
        base: name of the base model; None uses the one from which the stage started.

    Raises:
        ArtifactError: the stage trained no adapter, or one that other tools cannot load.
    """
    if source.kind != "policy":
        raise ArtifactError(
            f"{source.model_dir.parent}: the head of a {source.kind} is not part of its adapter. "
            "Use --format model"
        )
    adapter = source.adapter_dir
    if adapter is None:
        raise ArtifactError(
            f"{source.model_dir.parent}: no adapter (its stage trained all weights, or it is a "
            "plain model folder). Use --format model"
        )
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") in _OWN:
        raise ArtifactError(
            f"{adapter}: a {config['peft_type']} adapter is the suite's own kind, which peft and "
            "vLLM cannot load. Train with tuning.method: lora"
        )
    # peft wrote the folder of the base on this machine, which means nothing elsewhere.
    config["base_model_name_or_path"] = base or base_model(source)[0]
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
    load_tokenizer(source.model_dir).save_pretrained(str(folder))


def weight_problems(expected: Path, folder: Path, *, dtype: str | None) -> Iterator[str]:
    """Yield one line for each tensor that is not exactly the source's, rounded to a dtype.

    Args:
        expected: folder with the source's safetensors. folder: the exported folder.
        dtype: dtype of the export; None if tensors are copied.
    """
    kind = None if dtype is None else getattr(torch, dtype)
    try:
        exported = _tensor_files(folder)
        sources = _tensor_files(expected)
    except (OSError, ValueError, SafetensorError) as error:
        yield f"weights cannot be read: {error}"
        return
    yield from (f"{n}: missing from the weights" for n in sorted(sources.keys() - exported.keys()))
    yield from (
        f"{n}: not a weight of the source" for n in sorted(exported.keys() - sources.keys())
    )
    yield from _index_problems(folder, exported)
    for name in sorted(sources.keys() & exported.keys()):
        ours, theirs = _tensor(sources[name], name), _tensor(exported[name], name)
        ours = ours if kind is None else rounded(ours, kind)
        if theirs.dtype != ours.dtype:
            yield f"{name}: dtype {theirs.dtype}, expected {ours.dtype}"
        elif theirs.shape != ours.shape:
            yield f"{name}: shape {list(theirs.shape)}, expected {list(ours.shape)}"
        elif not bool(theirs.isfinite().all()):
            yield f"{name}: contains NaN or infinity"
        elif not torch.equal(ours, theirs):
            rows = (ours != theirs).reshape(len(ours), -1).any(1) if ours.ndim else ours != theirs
            yield f"{name}: {int(rows.sum())} of {rows.numel()} rows differ from the source"


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a folder."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def _index_problems(folder: Path, exported: dict[str, Path]) -> Iterator[str]:
    """Yield one line for each entry of a shard index without its file or tensor."""
    for index in folder.glob("*.safetensors.index.json"):
        named = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        for file in sorted({f for f in named.values() if not (folder / f).is_file()}):
            yield f"{file}: missing, but {index.name} names it"
        wrong = [n for n, file in exported.items() if named.get(n) != file.name]
        if wrong:
            yield f"{index.name}: does not name the file of {len(wrong)} tensors, as {wrong[0]}"


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
