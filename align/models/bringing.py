"""Import a model saved by others: check its folder first, and the loader's report afterwards.

transformers initializes missing weights randomly and only mentions it in a report. Here, every such
problem ends the stage with one line that names it.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from align.core.errors import AlignError, ArtifactError
from align.core.model_folder import CONFIG, INDEX, SINGLE, check_files, json_object
from align.models.decoder import attention_for, form_of
from align.models.loading import load_tokenizer

log = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16")
_WRAPPERS = ("_orig_mod.", "module.", "model.", "base_model.model.")
_KEPT = ("eos_token_id", "pad_token_id", "bos_token_id", "transformers_version")
"""Settings for generation that the suite saves itself, or that are none."""
_HEADS = ("lm_head.", "embed_out.")
PREFIXES = (*_WRAPPERS, *("".join(pair) for pair in product(_WRAPPERS, repeat=2)))
"""Prefixes that compiled, parallel and wrapped modules add to the names of their weights."""


@contextmanager
def one_line(path: str, what: str) -> Iterator[None]:
    """Convert any error that a library raises while reading a folder into one line.

    Raises:
        ArtifactError: names the folder and the beginning of the library's message.
    """
    try:
        yield
    # Errors of the suite already say what to do.
    except AlignError:
        raise
    except Exception as error:  # a damaged folder can fail anywhere in transformers
        told = " ".join(str(error).split())[:300] or "no reason given"
        raise ArtifactError(
            f"{path}: cannot be read as {what}: {type(error).__name__}: {told}. Use a folder "
            "written by transformers' save_pretrained, or a hub id."
        ) from error


def check_folder(path: str, *, causal: bool = True) -> None:
    """Raise unless a folder contains one complete causal language model.

    Args:
        path: the folder or hub id. causal: False where an encoder is expected, with any head.

    Raises:
        ArtifactError: one line with the problem and the remedy.
    """
    folder = Path(path)
    if not folder.exists():
        return  # a hub id
    # The files first, before any weight is read.
    config = check_files(path, causal=causal)
    kind = str(config.get("model_type"))
    if causal and kind in CONFIG_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ArtifactError(
            f"{path}: transformers has no causal language model of the type {kind!r}. Use a model "
            "that generates text from left to right, or a stage of kind encoder for an encoder."
        )
    if "auto_map" in config and kind not in CONFIG_MAPPING:
        raise ArtifactError(
            f"{path}: model_type {kind!r} needs custom Python code "
            "(auto_map), which is never run. Use an architecture of transformers."
        )
    with one_line(f"{folder / CONFIG}", "a model's configuration"):
        AutoConfig.from_pretrained(path, trust_remote_code=False)
    _check_formats(folder)


def _check_formats(folder: Path) -> None:
    """Refuse weights that are stored in 8 bits or as integers: they are quantized.

    transformers would convert the integers to floats, without the scales that they belong to.
    """
    for file, name, kind in _formats(folder):
        if kind not in _FLOATS:
            raise ArtifactError(
                f"{file}: {name} is stored as {kind}, so the weights are quantized and cannot be "
                "trained. Import the original weights (tuning.method: qlora quantizes them itself)."
            )


def _formats(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield the file, name and format (``BF16``) of each weight in a folder's safetensors files.

    Buffers are left out: positions and masks are integers in sound models too.
    """
    # Only the files that transformers reads: there may also be an optimizer's states.
    shards = json_object(folder / INDEX)["weight_map"] if (folder / INDEX).is_file() else {}
    for file in sorted(folder / name for name in {*shards.values()} or {SINGLE}):
        if file.suffix != ".safetensors" or not file.is_file():
            continue
        with one_line(str(file), "weights"), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                if name.endswith("weight"):
                    yield file, name, tensors.get_slice(name).get_dtype()


def stored_dtype(path: str) -> str:
    """Return ``bfloat16`` if all weights of a model are stored in it, else ``float32``.

    config.json is not asked: it may name another data type than that of the files.
    """
    folder = Path(path)
    if not folder.exists():
        folder = _downloaded(path)
    return "bfloat16" if {kind for _, _, kind in _formats(folder)} == {"BF16"} else "float32"


def _downloaded(hub_id: str) -> Path:
    """Return the folder of a hub id's weights in the cache, after downloading what is missing."""
    quiet: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    found = cached_file(hub_id, SINGLE, **quiet) or cached_file(hub_id, INDEX, **quiet)
    if found is None:
        return Path(hub_id)  # no safetensors
    if Path(found).name == INDEX:
        get_checkpoint_shard_files(hub_id, found)
    return Path(found).parent


def load_whole(path: str, *, dtype: str | None) -> Any:
    """Load a causal language model and verify that every weight comes from its files.

    Args:
        path: folder or hub id. dtype: of the weights; None for that of the files
            (``stored_dtype``).

    Raises:
        ArtifactError: weights are missing, unexpected, of another shape or not finite, or the
            architecture is not supported.
    """
    with one_line(path, "a causal language model"):
        chosen = getattr(torch, stored_dtype(path) if dtype is None else dtype)
    options: dict[str, Any] = {
        "dtype": chosen,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported by name below
        "trust_remote_code": False,
    }
    with one_line(path, "a causal language model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        options["attn_implementation"] = attention_for(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        model, report = loaded
        # Compiled or wrapped models add a prefix to all names; load again without it.
        if prefix := _known_prefix(report):
            log.warning("%s: the prefix %r is removed from the names of its weights", path, prefix)
            mapping = {f"^{re.escape(prefix)}": ""}
            names = getattr(model, "_weight_conversions", None)
            loaded = AutoModelForCausalLM.from_pretrained(path, key_mapping=mapping, **options)
            model, report = loaded
            model._weight_conversions = names  # else the prefix would be restored on saving
    _check_report(path, report)
    refuse_not_finite(path, model)
    settle_ties(path, model)
    form_of(model)
    return model


def settle_ties(path: str, model: PreTrainedModel) -> None:
    """Make the configuration say that a head has weights of its own, where it does.

    transformers keeps such a head although config.json ties it to the embedding, and vLLM would
    leave it out, so they would read two models.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    config = model.config.get_text_config()
    if not config.tie_word_embeddings or head is None or head.weight is table.weight:
        return
    log.warning(
        "%s: config.json ties the head to the embedding (tie_word_embeddings: true), but its files "
        "have two different weights; both are kept, and the setting is saved as false",
        path,
    )
    model.config.tie_word_embeddings = config.tie_word_embeddings = False


def refuse_not_finite(path: str, model: nn.Module) -> None:
    """Raise if weights of a model are NaN or infinite.

    Raises:
        ArtifactError: names the weights.
    """
    # Checked at import: later, one NaN would look like an unstable training.
    bad = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ArtifactError(
            f"{path}: {len(bad)} weights contain NaN or infinity: {_named(bad)}. Use a copy from "
            "before they were damaged."
        )


def _known_prefix(report: Mapping[str, Any]) -> str:
    """Return the prefix whose removal turns unexpected names into missing ones, or ""."""
    # Exactly one prefix explains all names, or none is removed.
    surplus, missing = set(report["unexpected_keys"]), set(report["missing_keys"])
    for prefix in PREFIXES:
        stripped = {name.removeprefix(prefix) for name in surplus if name.startswith(prefix)}
        # A tied head may be missing from both.
        if stripped and all(n in stripped or n.startswith(_HEADS) for n in missing):
            return prefix
    return ""


def _check_report(path: str, report: Mapping[str, Any]) -> None:
    faults = [
        ("missing from its files (they would be random)", sorted(report["missing_keys"])),
        ("in its files but not in the model", sorted(report["unexpected_keys"])),
        ("with a shape that differs from config.json", sorted(map(str, report["mismatched_keys"]))),
    ]
    told = [f"{len(names)} weights {what}: {_named(names)}" for what, names in faults if names]
    if told:
        raise ArtifactError(
            f"{path}: {'; '.join(told)}. Check that config.json belongs to "
            "this model, and save or download it again."
        )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_saved_tokenizer(tokenizer: PreTrainedTokenizerBase, saved: Path) -> None:
    """Check that a saved tokenizer, as every later stage loads it, has each token and its id.

    A tokenizer with one id for two tokens loses one of them when it is saved.

    Raises:
        ArtifactError: it cannot be loaded, or a token is another one.
    """
    with one_line(str(saved), "the tokenizer that was saved"):
        found = load_tokenizer(saved).get_vocab()
    vocab = dict(sorted(tokenizer.get_vocab().items()))
    changed = next((token for token, number in vocab.items() if found.get(token) != number), None)
    if changed is None:
        return
    # The usual cause is two tokens with one id.
    owner: dict[int, str] = {}
    twins = [
        (owner[number], token)
        for token, number in vocab.items()
        if owner.setdefault(number, token) != token
    ]
    reason = f"; {twins[0][0]!r} and {twins[0][1]!r} have one id" if twins else ""
    raise ArtifactError(
        f"{saved}: the token {changed!r} has id {vocab[changed]} in the tokenizer of this model, "
        f"and id {found.get(changed)} once it is saved{reason}. Give every token of "
        "tokenizer.json an id of its own."
    )


def check_encodes(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ArtifactError if a tokenizer turns text into no tokens, or into random ones.

    transformers chooses the class of some tokenizers by the type of the model. Without the files of
    that class its vocabulary is empty, whatever the folder has instead.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if dropout := getattr(model, "dropout", None):
        raise ArtifactError(
            f"{path}: its tokenizer leaves out merges at random (model.dropout {dropout:g} in "
            "tokenizer.json), so the same text has other tokens each time; set dropout to null"
        )
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    # A tokenizer of other words may drop or refuse this one, but it has a vocabulary.
    if len(tokenizer.get_vocab().keys() - added) > 1:
        return
    if not tokenizer("Hello", add_special_tokens=False)["input_ids"]:
        raise ArtifactError(
            f"{path}: its tokenizer, read as {type(tokenizer).__name__}, makes no tokens of the "
            "text 'Hello'; expected at least one. Put the tokenizer.json that belongs to the model "
            "into the folder"
        )


def check_stops(path: str, tokenizer: PreTrainedTokenizerBase, *, chosen: bool) -> None:
    """Raise if stop tokens contradict each other or are outside the model's vocabulary.

    Args:
        path: the folder or hub id.
        tokenizer: the tokenizer saved with the model.
        chosen: the recipe sets the stop token, which resolves a contradiction.

    Raises:
        ArtifactError: names the tokens and the line to add to the recipe.
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
            raise ArtifactError(
                f"{path}: {file} names eos_token_id {beyond[0]!r}; expected a number below {rows}, "
                "the size of the vocabulary. Replace it with the id of the tokenizer's "
                f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})."
            )
    pad = config.get_text_config().pad_token_id
    if rows and isinstance(pad, int) and pad >= rows:
        raise ArtifactError(
            f"{path}: config.json names pad_token_id {pad}; expected a number below {rows}, the "
            f"size of the vocabulary. Replace it with {json.dumps(tokenizer.pad_token_id)}, as in "
            "the tokenizer."
        )
    # The generation configuration takes precedence over config.json.
    known = [i for ids in reversed(told.values()) for i in ids]
    own = tokenizer.eos_token_id
    if chosen or own is None or not known or own in known:
        return
    other = tokenizer.convert_ids_to_tokens(known[0])
    raise ArtifactError(
        f"{path}: the tokenizer's stop token is {tokenizer.eos_token!r} ({own}), "
        f"but {next(f for f in reversed(told) if told[f])} has {other!r} ({known[0]}). Set the "
        f'correct one in the recipe, for example tokenizer: {{stop_token: "{other}"}}'
    )


def tell_generation(path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log the settings for generation that are left behind, and warn of those that suppress a stop.

    Stages sample with the settings of their recipe. Of the model's own, only the stop tokens stay.
    """
    if (config := model.generation_config) is None:
        return
    given = {k: v for k, v in config.to_diff_dict().items() if k not in _KEPT and k[0] != "_"}
    if not given:
        return
    log.info(
        "%s: not kept of its settings for generation: %s; stages sample with those of their recipe",
        path,
        ", ".join(given),
    )
    stops: list[Any] = [tokenizer.eos_token_id, *_ids(config.eos_token_id)]
    for stop in dict.fromkeys(stops):
        if names := [name for name in given if stop in _suppressed(given[name], name)]:
            log.warning(
                "%s: %s in its settings for generation suppresses the stop token %s (%d), so that "
                "another program may never stop; the setting is not kept",
                path,
                " and ".join(names),
                tokenizer.convert_ids_to_tokens(stop),
                stop,
            )


def _suppressed(value: Any, name: str) -> list[Any]:
    """Return the tokens that a setting for generation suppresses."""
    if name in ("suppress_tokens", "begin_suppress_tokens"):
        return list(value)
    if name == "sequence_bias":  # pairs of a sequence of tokens and its bias
        pairs = value.items() if isinstance(value, dict) else value
        value = [sequence for sequence, bias in pairs if bias < 0]
    elif name != "bad_words_ids":
        return []
    return [sequence[0] for sequence in value if len(sequence) == 1]


def _ids(eos: object) -> list[Any]:
    return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
