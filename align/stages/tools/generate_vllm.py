"""Generation for ``align serve`` by vLLM: all requests at the same time, with LoRA adapters."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

from align.models.loading import num_positions
from align.sampling.vllm_serving import saved_adapter, serving_engine, streamed_params
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

CONTEXT = 8192
"""Largest context: the cache must have room for one such request."""


class VllmGenerator:
    """An engine of vLLM in this process.

    Args:
        folder: of the model.
        max_rank: largest rank of an adapter.

    Raises:
        TrainingError: vLLM cannot start.
    """

    name = "vllm"

    def __init__(self, folder: Path, *, max_rank: int) -> None:
        self._folder = folder
        self._context = min(num_positions(folder) or CONTEXT, CONTEXT)
        self._engine = serving_engine(folder, context=self._context, max_rank=max_rank)
        self._asked: dict[str, dict[str, Any]] = {}
        self._numbers: dict[str, int] = {}

    def run(self, requests: Requests, emit: Emit) -> None:
        """Respond to all requests that are there, a token of each at a time, for ever."""
        while True:
            with suppress(Empty):
                while True:
                    asked = requests.waiting.get(block=not self._asked)
                    try:
                        self._begin(asked, emit)
                    # A template refuses messages in many ways, and vLLM an adapter.
                    except Exception as error:
                        told = f"{type(error).__name__}: {error}"
                        emit(problem(asked, told, "generation_failed"))
            for request in requests.cancelled & {asked["id"] for asked in self._asked.values()}:
                requests.cancelled.discard(request)
                self._engine.abort_request([str(request)])
                self._done(str(request), emit)
            for output in self._engine.step() if self._asked else ():
                self._tell(output, emit)

    def _begin(self, asked: dict[str, Any], emit: Emit) -> None:
        chat = format_of(Path(asked["format"] or self._folder))
        ids = prompt_of(chat, asked)
        if refusal := too_long(asked, len(ids), self._context):
            emit(refusal)
            return
        greedy = asked["temperature"] == 0
        params = streamed_params(
            # vLLM refuses n > 1 without randomness, where all responses are the same.
            n=1 if greedy else asked["n"],
            max_tokens=min(asked["max_tokens"], self._context - len(ids)),
            temperature=asked["temperature"],
            top_p=asked["top_p"],
            seed=asked["seed"],
            stop=asked["stop"],
            stop_token_ids=sorted(chat.stop_token_ids),
            logprobs=asked["logprobs"],
        )
        name = str(asked["id"])
        prompt = {"prompt_token_ids": ids}
        lora = self._lora(adapter_of(asked))
        self._engine.add_request(name, prompt, params, lora_request=lora)
        copies = asked["n"] if greedy else 1
        self._asked[name] = {**asked, "prompt": len(ids), "made": 0, "copies": copies}

    def _lora(self, adapter: str | None) -> Any:
        if adapter is None:
            return None
        return saved_adapter(adapter, self._numbers.setdefault(adapter, len(self._numbers) + 1))

    def _done(self, name: str, emit: Emit) -> None:
        asked = self._asked.pop(name)
        counts = {"prompt_tokens": asked["prompt"], "completion_tokens": asked["made"]}
        emit({"id": asked["id"], "done": True, **counts})

    def _tell(self, output: Any, emit: Emit) -> None:
        """Send what a step has added to one request."""
        asked = self._asked.get(output.request_id)
        if asked is None:
            return
        for part in output.outputs:
            asked["made"] += len(part.token_ids) * asked["copies"]
            for copy in range(asked["copies"]):
                common = {"id": asked["id"], "index": part.index + copy}
                if part.text:
                    emit({**common, "text": part.text})
                if part.logprobs:
                    entry = partial(_entry, top=asked["logprobs"])
                    entries = map(entry, part.token_ids, part.logprobs)
                    emit({**common, "logprobs": list(entries)})
                if part.finish_reason is not None:
                    emit({**common, "finish": part.finish_reason})
        if output.finished:
            self._done(output.request_id, emit)


def _entry(token: int, found: Mapping[int, Any], *, top: int) -> dict[str, Any]:
    """Return a sampled token with the most likely ones."""
    own = found[token]
    ranked = sorted(found.values(), key=lambda x: x.rank)
    # The sampled token is there too, whatever its rank.
    listed = [token_entry(x.decoded_token or "", x.logprob) for x in ranked if x.rank <= top]
    return {**token_entry(own.decoded_token or "", own.logprob), "top_logprobs": listed}
