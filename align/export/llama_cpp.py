"""llama.cpp, where llama-cpp-python is installed: what it reads in a GGUF file, and its quantizer.

It runs in a process of its own, which it would end if a file were damaged:
``python -m align.export.llama_cpp``.
"""

import ctypes
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from align.core.errors import ArtifactError
from align.core.readers import TOP, ReaderError, Reading, answer, ask_reader, readings

PACKAGE = "llama-cpp-python"


@dataclass(frozen=True, slots=True)
class Read:
    """What llama.cpp makes of a GGUF file.

    Attributes:
        responses: its greedy response to each prompt. tokens: its token ids of each text.
    """

    responses: Sequence[Reading]
    tokens: Sequence[Sequence[int]]


def obstacle() -> str | None:
    """Return why llama.cpp cannot be asked, or None."""
    return None if find_spec("llama_cpp") else f"{PACKAGE} is not installed"


def read_by_llama_cpp(
    file: Path, prompts: Sequence[Sequence[int]], texts: Sequence[str], *, max_new_tokens: int
) -> Read:
    """Return llama.cpp's greedy responses to token ids, and how it splits texts into tokens.

    A response ends with the stop tokens of the file.

    Raises:
        ArtifactError: llama.cpp cannot load the file.
    """
    asked = {"prompts": [list(p) for p in prompts], "texts": list(texts)}
    found = _run("read", file, given={**asked, "max_new_tokens": max_new_tokens})
    return Read(readings(found["responses"]), found["tokens"])


def quantize(source: Path, target: Path) -> None:
    """Write a GGUF file in Q4_K_M.

    Raises:
        ArtifactError: llama.cpp's quantizer fails.
    """
    _run("quantize", source, target)


def _run(what: str, *files: Path, given: Mapping[str, Any] | None = None) -> Any:
    """Return what this module answers in a process of its own."""
    try:
        return ask_reader("align.export.llama_cpp", what, *map(str, files), given=given)
    except ReaderError as error:
        raise ArtifactError(f"{files[0]}: llama.cpp cannot {what} it: {error}") from None


def _read(file: str, asked: dict[str, Any]) -> dict[str, Any]:
    llama_cpp: Any = import_module("llama_cpp")
    room = max(map(len, asked["prompts"])) + asked["max_new_tokens"]
    exact: Any = llama_cpp.GGML_TYPE_F32  # of the cache, which is float16 by default
    model = llama_cpp.Llama(
        file, n_ctx=room, logits_all=True, type_k=exact, type_v=exact, verbose=False
    )
    vocabulary = model._model.vocab
    responses = []
    for prompt in asked["prompts"]:
        model.reset()
        tokens, tops, given = [], [], prompt
        while len(tokens) < asked["max_new_tokens"]:
            model.eval(given)
            logits = torch.from_numpy(model.scores[model.n_tokens - 1]).double()
            best = logits.log_softmax(-1).topk(min(TOP, len(logits)))
            tops.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            given = best.indices[:1].tolist()
            tokens += given
            if llama_cpp.llama_vocab_is_eog(vocabulary, given[0]):
                break
        responses.append((tokens, tops))
    split = [model.tokenize(text.encode(), add_bos=False) for text in asked["texts"]]
    model.close()
    return {"responses": responses, "tokens": split}


def _quantize(source: str, target: str) -> None:
    llama_cpp: Any = import_module("llama_cpp")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    given = source.encode(), target.encode(), ctypes.byref(options)
    if code := llama_cpp.llama_model_quantize(*given):
        sys.exit(f"llama_model_quantize returned {code}")


def main() -> None:
    """Read the file of the command line for the questions of standard input, or quantize it."""
    what, *files = sys.argv[1:]
    found = {}
    if what == "read":
        found = _read(files[0], json.loads(sys.stdin.read()))
    else:
        _quantize(*files)
    answer(found)


if __name__ == "__main__":
    main()
