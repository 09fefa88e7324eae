"""The tokenizer of a GGUF file: tokens, merges and types as llama.cpp reads them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.core.errors import ArtifactError
from align.models.loading import load_tokenizer, stop_token_ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of llama.cpp (gguf.TokenType)."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
PRE_TOKENIZERS = {
    _CONTRACTIONS + _WORDS + r"\p{N}" + _REST: "qwen2",
    _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
}
"""Regular expression by which a tokenizer splits text -> llama.cpp's name for it."""


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A tokenizer in llama.cpp's terms.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (BPE with byte fallback).
        pre: llama.cpp's name for how text is split.
        tokens: text of each id. types: type of each id. scores: only for ``llama``.
        merges: only for ``gpt2``.
        stop_token_ids: tokens that end a response.
        add_bos: whether text begins with BOS. add_space: whether it begins with a blank.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    bos_token_id: int | None
    pad_token_id: int | None
    stop_token_ids: Sequence[int]
    add_bos: bool
    add_space: bool
    chat_template: str | None


def gguf_tokenizer(model_dir: Path, *, num_rows: int) -> GgufTokenizer:
    """Return the tokenizer of a model folder for a GGUF file.

    Args:
        model_dir: the model folder.
        num_rows: rows of the embeddings; ids without a token become unused tokens.

    Raises:
        ArtifactError: llama.cpp has no such tokenizer, or this suite does not know its name.
    """
    tokenizer = load_tokenizer(model_dir)
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    model = plain["model"]
    if model["type"] != "BPE":
        raise ArtifactError(
            f"{model_dir}: GGUF export does not support a tokenizer of type {model['type']}, only "
            "BPE. Use --format model, and llama.cpp's own converter"
        )
    if len(tokenizer) > num_rows:
        raise ArtifactError(f"{model_dir}: {len(tokenizer)} tokens, but {num_rows} embedding rows")
    # Older tokenizer.json files have a merge as one string, newer ones as a pair.
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    fallback = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer, num_rows, fallback=fallback)
    # Whether the tokenizer writes a BOS is asked of it: settings and what it does may differ.
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return GgufTokenizer(
        model="llama" if fallback else "gpt2",
        pre="default" if fallback else _pre_tokenizer(plain, model_dir),
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if fallback else [],
        merges=[] if fallback else merges,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        stop_token_ids=stop_token_ids(model_dir),
        add_bos=begins and tokenizer.bos_token_id is not None,
        add_space=fallback and _adds_space(plain),
        chat_template=tokenizer.chat_template,
    )


def _tokens(
    tokenizer: PreTrainedTokenizerBase, num_rows: int, *, fallback: bool
) -> tuple[list[str], list[int]]:
    # Every row of the table needs a name, also one that has no token.
    tokens = [f"[PAD{i}]" for i in range(num_rows)]
    types = [UNUSED] * num_rows
    added = tokenizer.added_tokens_decoder
    for text, i in tokenizer.get_vocab().items():
        tokens[i], types[i] = text, NORMAL
        # A byte that no token covers is written as <0x0A>.
        if fallback and len(text) == 6 and text.startswith("<0x"):
            types[i] = BYTE
        if i in added:
            types[i] = CONTROL if added[i].special else USER_DEFINED
    unknown = tokenizer.unk_token_id
    if fallback and isinstance(unknown, int):
        types[unknown] = UNKNOWN
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return a score per token: llama.cpp joins the pair whose token has the highest score."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    # Tokens that no merge makes are characters, which are never joined from a pair.
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _pre_tokenizer(plain: Mapping[str, Any], model_dir: Path) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text."""
    steps = plain.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    splits = [s["pattern"].get("Regex", "") for s in steps if s.get("type") == "Split"]
    levels = [s for s in steps if s.get("type") == "ByteLevel"]
    kinds = {s.get("type") for s in steps}
    if kinds == {"ByteLevel"} and levels[0].get("use_regex", True):
        return "gpt-2"
    # llama.cpp knows a tokenizer by the expression that splits the text before the merges.
    whole = kinds == {"Split", "ByteLevel"} and len(splits) == 1
    if whole and splits[0] in PRE_TOKENIZERS and not levels[0].get("use_regex", True):
        return PRE_TOKENIZERS[splits[0]]
    raise ArtifactError(
        f"{model_dir}: GGUF export does not know llama.cpp's name for this tokenizer's way to "
        f"split text ({', '.join(splits) or ', '.join(map(str, sorted(kinds, key=str)))}). Use "
        "--format model, and llama.cpp's own converter"
    )


def _adds_space(plain: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer with byte fallback puts a blank before text."""
    steps = plain.get("normalizer") or {}
    steps = steps.get("normalizers", [steps])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    pre = plain.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    return any(p.get("prepend_scheme") in ("always", "first") for p in parts)
