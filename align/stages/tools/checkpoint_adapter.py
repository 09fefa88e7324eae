"""The LoRA adapter in a checkpoint of a finished stage, as a folder of its own."""

import os
import shutil
import tempfile
from pathlib import Path

from align.core.errors import ArtifactError


def write_adapter(checkpoint: Path, *, like: Path, out: Path) -> None:
    """Write the adapter of a checkpoint in peft's format; do nothing if it is there already.

    Args:
        checkpoint: file with the weights of the checkpoint.
        like: the adapter at the end of the same stage, whose configuration this one has.
        out: folder to write.

    Raises:
        ArtifactError: the checkpoint is gone, or has other weights.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from align.tuning.files import CONFIG, WEIGHTS

    if out.is_dir():
        return
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
        last = load_file(like / WEIGHTS)
    except OSError as error:
        raise ArtifactError(f"{checkpoint}: cannot be read ({error.strerror or error})") from error
    named = {_peft_name(name): tensor for name, tensor in saved["module"].items()}
    found = {name: named[name].contiguous().clone() for name in last if name in named}
    wrong = [name for name in last if name not in found or found[name].shape != last[name].shape]
    if wrong:
        raise ArtifactError(f"{checkpoint}: {wrong[0]} of the adapter is not in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        save_file(found, Path(folder, WEIGHTS), metadata={"format": "pt"})
        shutil.copyfile(like / CONFIG, Path(folder, CONFIG))
        whole = Path(folder)
        # Whole or not at all: another process may do the same.
        if not out.is_dir():
            os.replace(whole, out)
            whole.mkdir()


def _peft_name(name: str) -> str:
    """Return the name of an adapter's tensor in peft's files."""
    place = name.find("base_model.model.")
    return name[max(0, place) :].replace(".default.", ".")
