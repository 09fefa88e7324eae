"""Generation for ``align serve`` by transformers: any model, one request after the other."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.stages.tools.chat import Chat
from align.stages.tools.generate import (
    Emit,
    Requests,
    adapter_of,
    format_of,
    problem,
    prompt_of,
    token_entry,
    too_long,
)
from align.tuning.switching import AdapterSwitch

if TYPE_CHECKING:
    from torch import Tensor

    from align.data.render.chat import ChatFormat


class _Text:
    """The text of one response as it grows, up to the first of the stop texts.

    Args:
        emit: sends a part.
        stops: texts that end it and are not part of it.
    """

    def __init__(self, emit: Emit, stops: Sequence[str]) -> None:
        self._emit = emit
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
            self._emit({"text": self._held[:count]})
            self._held = self._held[count:]


class HfGenerator:
    """A model of transformers, with adapters of peft beside it.

    Args:
        folder: of the model.
    """

    name = "hf"

    def __init__(self, folder: Path) -> None:
        from transformers.utils import logging

        from align.models.bringing import one_line

        logging.disable_progress_bar()
        with one_line(str(folder), "a causal language model"):
            chat = Chat(folder, temperature=1.0, max_new_tokens=1)
        self._folder = folder
        self._model, self._positions = chat.model, chat.positions
        self._adapters = AdapterSwitch(chat.model)
        self._cancelled: set[int] = set()

    def run(self, requests: Requests, emit: Emit) -> None:
        """Respond to one request after the other, for ever."""
        self._cancelled = requests.cancelled
        while True:
            asked = requests.waiting.get()
            try:
                self._respond(asked, emit)
            # A template refuses messages in many ways; the next request may fit it.
            except Exception as error:
                emit(problem(asked, f"{type(error).__name__}: {error}", "generation_failed"))
            self._cancelled.discard(asked["id"])

    def _respond(self, asked: Mapping[str, Any], emit: Emit) -> None:
        """Send the parts of each response, why it ended, and the numbers of tokens."""
        chat = format_of(Path(asked["format"] or self._folder))
        ids = prompt_of(chat, asked)
        if refusal := too_long(asked, len(ids), self._positions):
            emit(refusal)
            return
        self._adapters.choose(adapter_of(asked))
        total = 0
        for index in range(asked["n"]):
            common = {"id": asked["id"], "index": index}
            told = partial(_send, emit, common)
            total += self._one(asked, told, chat=chat, ids=ids, seed=asked["seed"] + index)
        last = {"done": True, "prompt_tokens": len(ids), "completion_tokens": total}
        emit({"id": asked["id"], **last})

    def _one(
        self, asked: Mapping[str, Any], emit: Emit, *, chat: "ChatFormat", ids: list[int], seed: int
    ) -> int:
        """Send one response; return its number of tokens."""
        import torch
        from transformers import TextStreamer, set_seed

        text, request = _Text(emit, asked["stop"]), asked["id"]
        tokenizer: Any = chat.tokenizer
        stops, rows = list(chat.stop_token_ids), list[torch.Tensor]()

        class Streamer(TextStreamer):
            def on_finalized_text(self, part: str, stream_end: bool = False) -> None:
                text.add(part, ends=stream_end)

        def recorded(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            # Before the temperature, as the API has them.
            rows[:] = [scores[0].float().log_softmax(-1)]
            return scores

        def ended(input_ids: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
            if rows:
                entry = _entry(tokenizer, rows[0], int(input_ids[0, -1]), top=asked["logprobs"])
                emit({"logprobs": [entry]})
            stop = text.stopped or request in self._cancelled
            return torch.full((len(input_ids),), stop, device=input_ids.device, dtype=torch.bool)

        set_seed(seed)
        tokens = torch.tensor([ids], device=self._model.device)  # (1, T)
        room = asked["max_tokens"] if self._positions is None else self._positions - len(ids)
        with torch.inference_mode():
            output = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=min(room, asked["max_tokens"]),
                streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=[ended],
                logits_processor=[] if asked["logprobs"] is None else [recorded],
                eos_token_id=stops,
                pad_token_id=stops[0],
                **_sampling(asked["temperature"], asked["top_p"]),
            )
        made = output[0, len(ids) :].tolist()
        finished = text.stopped or (bool(made) and made[-1] in stops)
        emit({"finish": "stop" if finished else "length"})
        return len(made)


def _send(emit: Emit, common: Mapping[str, Any], part: Mapping[str, Any]) -> None:
    emit({**common, **part})


def _entry(tokenizer: Any, row: "Tensor", token: int, *, top: int) -> dict[str, Any]:
    """Return a sampled token with the most likely ones."""
    best = row.topk(top) if top else None
    listed = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
    found = token_entry(tokenizer.decode([token]), float(row[token]))
    return {**found, "top_logprobs": [token_entry(tokenizer.decode([i]), v) for i, v in listed]}


def _sampling(temperature: float, top_p: float) -> dict[str, Any]:
    # The saved generation configuration must not add a limit of its own, such as top_k.
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
