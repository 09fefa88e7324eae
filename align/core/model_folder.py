"""Check a model's folder by its JSON files alone, without torch and before any weight is read."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.core.errors import ArtifactError

ADAPTER, CONFIG = "adapter_config.json", "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_INDEX = "pytorch_model.bin.index.json"
_LFS = b"version https://git-lfs"
_WANTED = "expected the folder of a model that transformers' save_pretrained wrote, or a hub id"
_OTHER_FORMS = {
    "*.gguf": "quantized for inference; import the weights that it was made from",
    "consolidated*.pth": "Meta's own form; use the folder of the same model in transformers' form",
    "*.distcp": "shards of FSDP; merge them: accelerate merge-weights FOLDER OUT",
    "*/*.distcp": "shards of FSDP; merge them: accelerate merge-weights FOLDER OUT",
    "global_step*": "shards of DeepSpeed; merge them: python zero_to_fp32.py FOLDER OUT",
    "*.onnx": "for inference; import the weights that it was made from",
    "*.safetensors": "weights without a configuration; copy the model's config.json beside them",
}
"""Files of other programs, and what to do with them."""
OTHER_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
TOKENIZER_CLASSES = {
    **dict.fromkeys(("TokenizersBackend", "PreTrainedTokenizerFast"), ("pad_token", "eos_token")),
    **dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer", "GPT2Tokenizer"), ("pad_token",)),
}
"""Classes of transformers, and the tokens for which they have no default."""
_TEXTS = ("id2label", "label2id", "task_specific_params", "finetuning_task", "tags")
"""Keys of a configuration whose texts may look like numbers, besides versions and paths (``_``)."""
_QUOTED = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|true|false", re.IGNORECASE)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def is_adapter(path: str) -> bool:
    """Return whether a folder contains an adapter and no model."""
    folder = Path(path)
    return (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file()


def check_files(path: str, *, causal: bool = True) -> dict[str, Any]:
    """Return a model's configuration, unless its folder cannot be one complete model.

    Args:
        path: the folder. causal: False where an encoder is expected, with any head.

    Raises:
        ArtifactError: one line with the problem and the remedy.
    """
    folder = Path(path)
    refuse_other_form(path)
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{path}: an adapter; expected the folder of a whole model")
    if (folder / ADAPTER).is_file():
        raise ArtifactError(
            f"{path}: contains both a model and an adapter ({ADAPTER}). Move the adapter's files "
            "to their own folder and use that folder (the adapter is merged), or remove them."
        )
    config = json_object(folder / CONFIG)
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ArtifactError(f"{folder / CONFIG}: architectures: expected a list of class names")
    if causal and named and any(head in named[0] for head in OTHER_HEADS):
        raise ArtifactError(
            f"{path}: {named[0]} has no language-model head. Use a stage of kind encoder to start "
            "a classifier or scorer, or the causal model it was made from."
        )
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ArtifactError(
            f"{path}: its weights are quantized ({method}) and cannot be trained. Import the "
            "original weights (tuning.method: qlora quantizes them itself)."
        )
    _check_dtype(config, f"{folder / CONFIG}")
    _refuse_quoted(config, f"{folder / CONFIG}")
    _check_weights(folder)
    return config


def _check_dtype(config: dict[str, Any], where: str) -> None:
    """Raise unless torch knows a configuration's dtype and those of its parts."""
    for key in ("dtype", "torch_dtype"):
        if config.get(key) not in (None, *DTYPES):
            raise ArtifactError(
                f"{where}: {key}: {config[key]!r} is no dtype of weights; expected one of "
                f"{', '.join(DTYPES)}. Correct it, or remove the line."
            )
    for name, part in config.items():
        if name.endswith("_config") and isinstance(part, dict):
            _check_dtype(part, f"{where}: {name}")


def _refuse_quoted(value: object, where: str) -> None:
    """Raise if a number, true or false of a configuration is written as text.

    Some are used as they are, and others fail wherever they are read first.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in _TEXTS and not key.startswith("_") and not key.endswith("version"):
                _refuse_quoted(inner, f"{where}: {key}")
    elif isinstance(value, list):
        for inner in value:
            _refuse_quoted(inner, where)
    elif isinstance(value, str) and _QUOTED.fullmatch(value):
        raise ArtifactError(
            f"{where}: {value!r} is text; expected {value.lower()}, without quotes. Correct it."
        )


def refuse_other_form(path: str) -> None:
    """Raise if a path is a file, or a folder with a model in the form of another program.

    Raises:
        ArtifactError: says what is there, and what to use.
    """
    place = Path(path)
    if place.is_file():
        what = "a file"
        if place.suffix == ".gguf":
            what += f", {_OTHER_FORMS['*.gguf']}"
        elif (place.parent / CONFIG).is_file():
            what += f" of the folder {place.parent}; use that"
        raise ArtifactError(f"{path}: {what}; {_WANTED}")
    if not any((place / name).is_file() for name in (CONFIG, ADAPTER)):
        raise ArtifactError(
            f"{path}: no {CONFIG} or {ADAPTER} in this folder; {_WANTED}{_found_here(place)}"
        )


def _found_here(folder: Path) -> str:
    """Return what a folder has in place of the weights that transformers reads, or ""."""
    inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    if inner and not (folder / CONFIG).is_file():
        return f". Folders with a model in it: {', '.join(inner[-3:])}"
    for pattern, what in _OTHER_FORMS.items():
        if found := next(folder.glob(pattern), None):
            return f". It has {found.name}: {what}"
    return ""


def _check_weights(folder: Path) -> None:
    """Raise unless the folder has the files of exactly one set of weights."""
    # As transformers looks for them: the index of older files may be left without them.
    names = (INDEX,) if (folder / SINGLE).is_file() else (INDEX, OLD_INDEX)
    index = next((folder / name for name in names if (folder / name).is_file()), None)
    if index is None:
        found = (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))
        files = [path for path in found if path.is_file()]
        if not files:
            raise ArtifactError(
                f"{folder}: no weights (model.safetensors) beside config.json{_found_here(folder)}"
            )
        _refuse_no_weights(files)
        return
    shards = json_object(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ArtifactError(f"{index}: no weight_map. Save the model again.")
    names = sorted({str(name) for name in shards.values()})
    # An index may name any path; files outside the folder are never read.
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ArtifactError(f"{index}: names files outside the folder: {outside[:3]}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{folder}: {len(missing)} of {len(names)} weight files are missing: "
            f"{', '.join(missing[:3])}. Copy or download them again."
        )
    _refuse_no_weights([folder / name for name in names])
    if index.name == INDEX and (folder / SINGLE).is_file() and SINGLE not in names:
        raise ArtifactError(
            f"{folder}: contains two sets of weights, {SINGLE} and the {len(names)} files of "
            f"{INDEX}; which of them is the model depends on the reader. Remove the other set."
        )


def _refuse_no_weights(files: Sequence[Path]) -> None:
    """Raise if a file is empty, or what Git keeps in place of a large file."""
    for file in files:
        with file.open("rb") as stream:
            head = stream.read(len(_LFS))
        if head == _LFS:
            raise ArtifactError(f"{file}: a Git LFS pointer, not the weights. Run 'git lfs pull'.")
        if not head:
            raise ArtifactError(f"{file}: an empty file. Copy or download it again.")


def json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ArtifactError: the file cannot be read, or has anything else in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def lacking_of_tokenizer(path: str) -> set[str]:
    """Return what the tokenizer in a folder lacks for certain.

    Other things may be missing too: most tokenizer classes have defaults, and this function knows
    those of a few.

    Returns:
        A part of ``pad_token``, ``eos_token`` and ``chat_template``; empty if the folder has no
        ``tokenizer_config.json``.

    Raises:
        ArtifactError: one of the files is not a JSON object.
    """
    folder = Path(path)
    if not (folder / "tokenizer_config.json").is_file():
        return set()
    saved = json_object(folder / "tokenizer_config.json")
    tokens = folder / "special_tokens_map.json"
    more = json_object(tokens) if tokens.is_file() else {}
    name = str(saved.get("tokenizer_class")).removesuffix("Fast")
    undefined = TOKENIZER_CLASSES.get(name) or TOKENIZER_CLASSES.get(f"{name}Fast") or ()
    lacking = {
        key
        for key in ("pad_token", "eos_token")
        if saved.get(key) is None and more.get(key) is None and (key in saved or key in undefined)
    }
    # The file of the fast tokenizer may say what it pads with.
    fast = folder / "tokenizer.json"
    if "pad_token" in lacking and fast.is_file() and json_object(fast).get("padding"):
        lacking.discard("pad_token")
    templates = ("chat_template.jinja", "chat_template.json", "chat_templates")
    templates += ("additional_chat_templates",)
    has_template = saved.get("chat_template") or any((folder / x).exists() for x in templates)
    return lacking if has_template else lacking | {"chat_template"}


def refuse_unpadded(path: str, *, padded: bool) -> None:
    """Raise ArtifactError for an encoder whose tokenizer has no pad token."""
    if not padded:
        raise ArtifactError(
            f"{path}: its tokenizer has no pad token. Add one and save the folder again"
        )
