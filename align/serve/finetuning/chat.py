"""Chat completions of base and fine-tuned models."""

import json
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import Field, model_validator
from starlette.types import Receive, Scope, Send

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.asked import Asked, Number, Whole
from align.serve.finetuning.common import Api, new_id, now
from align.serve.finetuning.generation import logprobs_object, usage_of, with_defaults

Stop = Annotated[str, Field(min_length=1)]


class Part(Asked):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Asked):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    # The client sends null for these.
    name: None = None
    refusal: None = None


class StreamOptions(Asked):
    """What a stream holds besides text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ResponseFormat(Asked):
    """The form of the response."""

    type: Literal["text"]


class ChatRequest(Asked):
    """A conversation to continue; settings that would have no effect are errors."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[Whole, Field(ge=1, le=16)] | None = None
    seed: Whole | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    user: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: it has an effect with logprobs: true only")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: it has an effect with stream: true only")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: give it or max_completion_tokens, not both")
        return self


def add_chat(routes: APIRouter, api: Api) -> None:
    """Add the route /v1/chat/completions."""
    me = api.me

    @routes.post("/chat/completions", response_model=None)
    def create(
        asked: ChatRequest, person: Annotated[Person, me]
    ) -> dict[str, Any] | StreamingResponse:
        body = asked.model_dump()
        if not asked.stream:
            return api.generators.complete(person, body)
        asks = with_defaults(body)
        events = api.generators.events(person, asks)
        # The first part comes before the headers, so that an error has its status.
        first = next(events)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return _Stream(_lines(asks, first, events, usage=usage), events)


class _Stream(StreamingResponse):
    """An answer in parts, which gives the model back also when its client leaves."""

    def __init__(self, lines: Generator[str], events: Generator[dict[str, Any]]) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self._generators = (lines, events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Not left to the garbage collector: until then, the client would hold its place.
            for generator in self._generators:
                # A thread is in it only if the server ends, and every process with it.
                with suppress(ValueError):
                    generator.close()


def _lines(
    asks: dict[str, Any],
    first: dict[str, Any],
    events: Iterator[dict[str, Any]],
    *,
    usage: bool,
) -> Generator[str]:
    """Yield the answer as server-sent events."""
    common = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": now(),
        "model": asks["model"],
    }
    begun: set[int] = set()

    def told(found: dict[str, Any]) -> str:
        return f"data: {json.dumps(common | found)}\n\n"

    try:
        for event in _chain(first, events):
            if "done" in event:
                if usage:
                    yield told({"choices": [], "usage": usage_of(event)})
                continue
            delta: dict[str, Any] = {"content": event["text"]} if "text" in event else {}
            if event["index"] not in begun:
                begun.add(event["index"])
                delta = {"role": "assistant", "content": "", **delta}
            entries = event.get("logprobs")
            choice = {
                "index": event["index"],
                "delta": delta,
                "logprobs": entries and logprobs_object(entries, asks),
                "finish_reason": event.get("finish"),
            }
            yield told({"choices": [choice]})
        yield "data: [DONE]\n\n"
    except ServeError as error:
        yield f"data: {json.dumps(error.body())}\n\n"


def _chain(first: dict[str, Any], events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from events
