"""llama.cpp, where llama-cpp-python is installed: what it reads in a GGUF file, and its quantizer.

It runs in a process of its own, which it would end if a file were damaged:
``python -m align.export.llama_cpp``.
"""

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from align.core.errors import ArtifactError
from align.export.parity import Reading

PACKAGE = "llama-cpp-python"
TOP = 20
"""Likeliest tokens whose log-probabilities are returned."""
_MARK = "READING "


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
    plain = _run("read", str(file), given=json.dumps(asked | {"max_new_tokens": max_new_tokens}))
    found: dict[str, Any] = json.loads(plain)
    responses = [
        (tokens, [{int(token): value for token, value in at.items()} for at in tops])
        for tokens, tops in found["responses"]
    ]
    return Read(responses, found["tokens"])


def quantize(source: Path, target: Path) -> None:
    """Write a GGUF file in Q4_K_M.

    Raises:
        ArtifactError: llama.cpp's quantizer fails.
    """
    _run("quantize", str(source), str(target))


def _run(*words: str, given: str = "") -> str:
    """Run this module and return what it answers."""
    done = subprocess.run(
        [sys.executable, "-m", "align.export.llama_cpp", *words],
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith(_MARK)]
    if done.returncode or not lines:
        said = [x for x in (done.stderr or done.stdout).splitlines() if x.strip()]
        last = " ".join(said[-1].split())[:300] if said else f"exit code {done.returncode}"
        raise ArtifactError(f"{words[1]}: llama.cpp cannot {words[0]} it: {last}")
    return lines[-1].removeprefix(_MARK)


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
    sys.stdout.write(f"\n{_MARK}{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
