"""Generate text for ``align serve``: requests on standard input, answers on standard output.

Both sides write one JSON object per line. A request has an ``id``, which every part of its answer
repeats; ``{"cancel": ID}`` ends it. The process has one base model, and a request may name a LoRA
adapter of it. It ends when its input does, so that it never outlives its server.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from align.core.errors import AlignError, ArtifactError, TrainingError

if TYPE_CHECKING:
    from align.data.render.chat import ChatFormat

log = logging.getLogger(__name__)
Emit = Callable[[Mapping[str, Any]], None]
MAX_FORMATS = 32
"""Tokenizers that stay loaded."""


class Generator(Protocol):
    """A loaded model."""

    name: str

    def run(self, requests: "Requests", emit: Emit) -> None:
        """Respond to requests for ever."""
        ...


class Requests:
    """What the server asks; a thread reads it, also while the model loads.

    Args:
        lines: one request or cancellation each. The process ends with them.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.waiting: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self.cancelled: set[int] = set()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            asked = json.loads(line)
            if "cancel" in asked:
                self.cancelled.add(asked["cancel"])
            else:
                self.waiting.put(asked)
        # The server is gone.
        os._exit(0)


def problem(asked: Mapping[str, Any], message: str, code: str) -> dict[str, Any]:
    """Return the last part of an answer that failed."""
    return {"id": asked["id"], "error": message[:500], "code": code}


@lru_cache(MAX_FORMATS)
def format_of(folder: Path) -> "ChatFormat":
    """Return the tokenizer and template in a folder."""
    from align.stages.base import chat_format

    return chat_format(folder)


def prompt_of(chat: "ChatFormat", asked: Mapping[str, Any]) -> list[int]:
    """Return the tokens of a request's messages; without a template they are text to continue."""
    turns = asked["messages"]
    templated = chat.tokenizer.chat_template is not None
    return chat.prompt_ids(turns if templated else "\n".join(turn["content"] for turn in turns))


def too_long(asked: Mapping[str, Any], length: int, positions: int | None) -> dict[str, Any] | None:
    """Return the error of messages that leave no room for a response."""
    if positions is None or length < positions:
        return None
    message = f"the messages have {length} tokens, but the model's context has {positions}"
    return problem(asked, message, "context_length_exceeded")


def adapter_of(asked: Mapping[str, Any]) -> str | None:
    """Return the folder of a request's adapter, which is taken out of its checkpoint if needed."""
    if asked["checkpoint"] is not None:
        place, like = Path(asked["checkpoint"]), Path(asked["like"])
        write_adapter(place, like=like, out=Path(asked["adapter"]))
    return asked["adapter"]


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


def token_entry(text: str, logprob: float) -> dict[str, Any]:
    """Return a token and its log-probability as the API has them."""
    # A token can be a part of a character, whose bytes the text no longer has.
    data = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": data}


def _load(place: Path, engine: str, *, max_rank: int) -> Generator:
    from align.models.bringing import check_folder
    from align.models.loading import model_folder
    from align.sampling.build import choose_engine

    folder = model_folder(place, "policy")
    check_folder(str(folder))
    chosen, reason = ("hf", "") if engine == "hf" else choose_engine("auto", folder)
    if engine == "vllm" and chosen == "hf":
        raise TrainingError(f"--engine vllm: {reason}")
    if chosen == "vllm":
        from align.stages.tools.generate_vllm import VllmGenerator

        try:
            return VllmGenerator(folder, max_rank=max_rank)
        except TrainingError as error:
            if engine == "vllm":
                raise
            # Only auto falls back: who asked for vLLM is told why it cannot be used.
            log.warning("%s; transformers generates instead", error)
    from align.stages.tools.generate_hf import HfGenerator

    return HfGenerator(folder)


def main() -> None:
    """Load the model named on the command line and respond until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a stage or model, or a hub id")
    parser.add_argument("--engine", choices=("auto", "vllm", "hf"), default="auto")
    parser.add_argument("--max-rank", type=int, default=64, help="largest rank of an adapter")
    args = parser.parse_args()
    # What libraries print must not be read as an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    requests = Requests(sys.stdin)
    try:
        generator = _load(args.model, args.engine, max_rank=args.max_rank)
    except AlignError as error:
        emit({"error": str(error), "code": "model_not_loaded"})
        sys.exit(error.exit_code)
    emit({"ready": generator.name})
    generator.run(requests, emit)


if __name__ == "__main__":
    main()
