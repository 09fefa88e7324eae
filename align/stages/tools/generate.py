"""Generate text for ``align serve``: requests on standard input, tokens on standard output.

Both sides write one JSON object per line. The process ends when its input does, so that it never
outlives its server.
"""

import argparse
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from align.core.errors import AlignError
from align.stages.tools.chat import Chat

Emit = Callable[[dict[str, Any]], None]


class _Text:
    """The text of one response as it grows, up to the first of the stop texts.

    Args:
        emit: sends a part.
        index: of the response.
        stops: texts that end it and are no part of it.
    """

    def __init__(self, emit: Emit, index: int, stops: Sequence[str]) -> None:
        self._emit = emit
        self._index = index
        self._stops = [text for text in stops if text]
        self._held = ""
        self.stopped = False

    def add(self, text: str, *, ends: bool) -> None:
        """Send what cannot be the beginning of a stop text."""
        if self.stopped:
            return
        self._held += text
        places = [p for stop in self._stops if (p := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            self._send(min(places))
            return
        held = 0 if ends else max(map(len, self._stops), default=1) - 1
        self._send(len(self._held) - held)

    def _send(self, count: int) -> None:
        if count > 0:
            self._emit({"index": self._index, "text": self._held[:count]})
            self._held = self._held[count:]


class Generator:
    """A loaded model that responds to requests.

    Args:
        chat: the model.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self.cancelled = threading.Event()

    def respond(self, asked: Mapping[str, Any], emit: Emit) -> None:
        """Send the parts of each response, why it ended, and the numbers of tokens."""
        chat = self._chat
        turns = asked["messages"]
        prompt = turns if chat.has_template else "\n".join(turn["content"] for turn in turns)
        ids = chat.format.prompt_ids(prompt)
        room = asked["max_tokens"] if chat.positions is None else chat.positions - len(ids)
        if room < 1:
            emit(
                {
                    "error": f"the messages have {len(ids)} tokens, but the model's context has "
                    f"{chat.positions}",
                    "code": "context_length_exceeded",
                }
            )
            return
        total = 0
        for index in range(asked["n"]):
            total += self._one(asked, emit, index=index, ids=ids, room=room)
        emit({"done": True, "prompt_tokens": len(ids), "completion_tokens": total})

    def _one(
        self, asked: Mapping[str, Any], emit: Emit, *, index: int, ids: list[int], room: int
    ) -> int:
        """Send one response; return its number of tokens."""
        import torch
        from transformers import TextStreamer, set_seed

        text = _Text(emit, index, asked["stop"])
        cancelled = self.cancelled

        class Streamer(TextStreamer):
            def on_finalized_text(self, part: str, stream_end: bool = False) -> None:
                text.add(part, ends=stream_end)

        def ended(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            stop = text.stopped or cancelled.is_set()
            return torch.full((len(input_ids),), stop, device=input_ids.device, dtype=torch.bool)

        chat, stops = self._chat, list(self._chat.format.stop_token_ids)
        tokenizer: Any = chat.format.tokenizer
        set_seed(asked["seed"] + index)
        tokens = torch.tensor([ids], device=chat.model.device)
        with torch.inference_mode():
            output = chat.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=min(room, asked["max_tokens"]),
                streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=[ended],
                eos_token_id=stops,
                pad_token_id=stops[0],
                **_sampling(asked["temperature"], asked["top_p"]),
            )
        made = output[0, len(ids) :].tolist()
        finished = text.stopped or (bool(made) and made[-1] in stops)
        emit({"index": index, "finish": "stop" if finished else "length"})
        return len(made)


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    # The saved generation configuration must not add a limit of its own, such as top_k.
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def _load(place: Path) -> Generator:
    from transformers.utils import logging

    from align.models.bringing import check_folder, one_line
    from align.models.loading import model_folder

    folder = model_folder(place, "policy")
    check_folder(str(folder))
    logging.disable_progress_bar()
    with one_line(str(folder), "a causal language model"):
        return Generator(Chat(folder, temperature=1.0, max_new_tokens=1))


def _read(
    lines: Iterable[str], requests: "SimpleQueue[dict[str, Any]]", generator: Generator
) -> None:
    for line in lines:
        asked = json.loads(line)
        if asked.get("cancel"):
            generator.cancelled.set()
        else:
            generator.cancelled.clear()
            requests.put(asked)
    # The server is gone.
    os._exit(0)


def main() -> None:
    """Load the model named on the command line and respond until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a stage or model, or a hub id")
    args = parser.parse_args()
    # What libraries print must not be read as an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        generator = _load(args.model)
    except AlignError as error:
        emit({"error": str(error), "code": "model_not_loaded"})
        sys.exit(error.exit_code)
    emit({"ready": True})
    requests: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin, requests, generator), daemon=True).start()
    while True:
        asked = requests.get()
        try:
            generator.respond(asked, emit)
        # A template refuses messages in many ways; the next request may fit it.
        except Exception as error:
            emit({"error": f"{type(error).__name__}: {error}"[:500], "code": "generation_failed"})


if __name__ == "__main__":
    main()
