"""Bring in a model that others saved: read its folder first, and what the loader reports after.

transformers fills what a checkpoint lacks at random and says so in a report that scrolls by; here
each such thing ends the stage in one line that names it.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from align.core.errors import AlignError, ArtefactError
from align.models.decoder import attention_for, form_of

log = logging.getLogger(__name__)

ADAPTER, CONFIG = "adapter_config.json", "config.json"
INDEX = "model.safetensors.index.json"
OTHER_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
_WRAPPERS = ("_orig_mod.", "module.", "model.", "base_model.model.")
_HEADS = ("lm_head.", "embed_out.")
PREFIXES = (*_WRAPPERS, *("".join(pair) for pair in product(_WRAPPERS, repeat=2)))
"""What compiled, parallel and wrapped modules put before the names of their weights."""


@contextmanager
def one_line(path: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a folder into one line.

    Raises:
        ArtefactError: names the folder and the library's first words.
    """
    try:
        yield
    except AlignError:
        raise
    except Exception as error:  # a damaged folder can fail anywhere in transformers
        told = " ".join(str(error).split())[:300] or "no reason given"
        raise ArtefactError(
            f"{path}: cannot be read as {what}: {type(error).__name__}: {told}; give a folder "
            "that transformers' save_pretrained wrote, or a hub id"
        ) from error


def is_adapter(path: str) -> bool:
    """Tell whether a folder holds an adapter and no model."""
    folder = Path(path)
    return (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file()


def check_folder(path: str) -> None:
    """Refuse a folder that holds another thing than one whole causal language model.

    Raises:
        ArtefactError: one line that says what was found and what to do.
    """
    folder = Path(path)
    if not folder.exists():
        return  # a hub id
    if not (folder / CONFIG).is_file():
        raise ArtefactError(f"{path}: no config.json; expected a folder saved by transformers")
    if (folder / ADAPTER).is_file():
        raise ArtefactError(
            f"{path}: holds a model and an adapter ({ADAPTER}) beside it; move the adapter's files "
            "into a folder of their own and name that (it is merged), or remove them"
        )
    config = _json_object(folder / CONFIG)
    kinds = [str(name) for name in config.get("architectures") or []]
    if kinds and any(head in kinds[0] for head in OTHER_HEADS):
        raise ArtefactError(
            f"{path}: {kinds[0]} has no language-model head; use a stage of kind encoder for a "
            "classifier's or scorer's start, or the causal model it was made from"
        )
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ArtefactError(
            f"{path}: model_type {config.get('model_type')!r} needs Python code of its own "
            "(auto_map), which is never run; use an architecture of transformers"
        )
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ArtefactError(
            f"{path}: its weights are quantized ({method}) and cannot be trained; bring in the "
            "weights they were made from (tuning.method: qlora quantizes by itself)"
        )
    _check_files(folder)


def _check_files(folder: Path) -> None:
    if not (folder / INDEX).is_file():
        if not [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*")]:
            raise ArtefactError(f"{folder}: no weights (model.safetensors) beside config.json")
        return
    shards = _json_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise ArtefactError(f"{folder / INDEX}: no weight_map; save the model again")
    names = sorted({str(name) for name in shards.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ArtefactError(f"{folder / INDEX}: names files outside the folder: {outside[:3]}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ArtefactError(
            f"{folder}: {len(missing)} of {len(names)} weight files are missing: "
            f"{', '.join(missing[:3])}; copy or download them again"
        )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArtefactError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def load_whole(path: str, *, dtype: str) -> Any:
    """Load a causal language model and refuse it unless every weight came from its files.

    Raises:
        ArtefactError: weights are missing, surplus, of another shape or not finite; or the suite
            cannot run this architecture.
    """
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused by name below
        "trust_remote_code": False,
    }
    with one_line(path, "a causal language model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        options["attn_implementation"] = attention_for(config)
        model, report = AutoModelForCausalLM.from_pretrained(path, **options)
        if prefix := _known_prefix(report):
            log.warning("%s: the prefix %r is taken off the names of its weights", path, prefix)
            mapping = {f"^{re.escape(prefix)}": ""}
            names = getattr(model, "_weight_conversions", None)
            model, report = AutoModelForCausalLM.from_pretrained(
                path, key_mapping=mapping, **options
            )
            model._weight_conversions = names  # else the prefix would come back on saving
    _check_report(path, report)
    bad = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ArtefactError(
            f"{path}: {len(bad)} weights hold NaN or infinity: {_named(bad)}; use a copy from "
            "before they were damaged"
        )
    form_of(model)
    return model


def _known_prefix(report: Any) -> str:
    """Return the prefix without which the surplus names are the missing ones, or nothing."""
    surplus, missing = set(report["unexpected_keys"]), set(report["missing_keys"])
    for prefix in PREFIXES:
        stripped = {name.removeprefix(prefix) for name in surplus if name.startswith(prefix)}
        # A tied head may be missing from both.
        if stripped and all(n in stripped or n.startswith(_HEADS) for n in missing):
            return prefix
    return ""


def _check_report(path: str, report: Any) -> None:
    faults = [
        ("missing from its files (they would be random)", sorted(report["missing_keys"])),
        ("in its files but not in the model", sorted(report["unexpected_keys"])),
        ("of another shape than config.json says", sorted(map(str, report["mismatched_keys"]))),
    ]
    told = [f"{len(names)} weights {what}: {_named(names)}" for what, names in faults if names]
    if told:
        raise ArtefactError(
            f"{path}: {'; '.join(told)}; is config.json this model's? Save or download it again"
        )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_stops(path: str, tokenizer: Any, *, chosen: bool) -> None:
    """Refuse stop tokens that contradict each other or that the model does not have.

    Args:
        path: the folder or hub id. tokenizer: as saved beside the model.
        chosen: the recipe names the stop token, which settles a contradiction.

    Raises:
        ArtefactError: names the tokens and the line to paste.
    """
    with one_line(path, "a model's configuration"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    told = {"config.json": _ids(config.get_text_config().eos_token_id)}
    if (Path(path) / "generation_config.json").is_file():
        with one_line(path, "a generation configuration"):
            saved = GenerationConfig.from_pretrained(path)
        told["generation_config.json"] = _ids(saved.eos_token_id)
    for file, ids in told.items():
        beyond = [i for i in ids if not isinstance(i, int) or i < 0 or (rows and i >= rows)]
        if beyond:
            raise ArtefactError(
                f"{path}: {file} names eos_token_id {beyond[0]}, but the vocabulary has {rows} "
                f"tokens; write the id of the tokenizer's {tokenizer.eos_token!r} "
                f"({tokenizer.eos_token_id}) there"
            )
    known = [i for ids in reversed(told.values()) for i in ids]
    own = tokenizer.eos_token_id
    if chosen or own is None or not known or own in known:
        return
    other = tokenizer.convert_ids_to_tokens(known[0])
    raise ArtefactError(
        f"{path}: the tokenizer ends texts in {tokenizer.eos_token!r} ({own}), "
        f"{next(f for f in reversed(told) if told[f])} in {other!r} ({known[0]}); say which is "
        f'right: tokenizer: {{stop_token: "{other}"}}'
    )


def _ids(eos: Any) -> list[Any]:
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
