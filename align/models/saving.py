"""Save a model: its weights as they come, its configuration and its tokenizer.

At most one file's tensors are in memory.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from align.core import distributed
from align.core.errors import ArtifactError
from align.core.storage import MIB, write_patiently
from align.models.loading import load_tokenizer

FILE_BYTES = 750 * 10**6
"""Largest size of a file; a tensor that is larger has one of its own."""
_INDEX = "model.safetensors.index.json"
_PART = "model-{:05d}.part"


def save_policy(
    named: Iterable[tuple[str, Tensor]], *, source_dir: Path, directory: Path, dtype: str
) -> None:
    """Save weights under Hugging Face names, with the config and tokenizer of ``source_dir``.

    Waits for space on a full disk.

    Args:
        named: names and tensors, which are written as they come (``write_weights``).
        source_dir: a model of the same architecture. directory: made if missing.
        dtype: of the weights.

    Raises:
        ArtifactError: ``named`` does not contain exactly the weights of the architecture.
    """
    # Weights, configuration and tokenizer always travel together.
    config = AutoConfig.from_pretrained(str(source_dir), trust_remote_code=False)
    config.dtype = dtype
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(_fitting(named, config), directory)

    def write() -> None:
        config.save_pretrained(str(directory))
        load_tokenizer(source_dir).save_pretrained(str(directory))
        # It names further stop tokens, without which the saved model would not stop.
        if (source_dir / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(str(source_dir)).save_pretrained(str(directory))

    write_patiently(write, folder=directory, needed=MIB, stop=distributed.was_asked)


def _fitting(
    named: Iterable[tuple[str, Tensor]], config: PreTrainedConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of an architecture, but none that is another one's, such as a tied head.

    A note of shared names would make the file's header nondeterministic.
    """
    # Names only: no memory is allocated for the weights.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # The head has a name of its own in some architectures: output_projection, embed_out.
    tied = set(model.all_tied_weights_keys)
    own = ((name, tensor) for name, tensor in named if name not in tied)
    return fitting_weights(own, set(model.state_dict()) - tied, what=type(model).__name__)


def fitting_weights(
    named: Iterable[tuple[str, Tensor]], expected: Collection[str], *, what: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights whose names are expected; ``what`` names the architecture.

    Raises:
        ArtifactError: after the last one, if a weight was missing or unexpected.
    """
    missing, surplus = set(expected), []
    for name, tensor in named:
        if name in missing:
            missing.remove(name)
            yield name, tensor
        else:
            surplus.append(name)
    if missing or surplus:
        raise ArtifactError(
            f"weights to save do not fit {what}: missing {sorted(missing)[:3]}, "
            f"unexpected {sorted(surplus)[:3]}"
        )


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
