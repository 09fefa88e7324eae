"""Processes that generate text: started for the first request, ended when others need the room."""

import json
import logging
import os
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.common import new_id, now
from align.serve.finetuning.models import find_place, model_files_exist
from align.serve.settings import Settings
from align.serve.store import Store

log = logging.getLogger(__name__)
MAX_MODELS = 2
"""Models that are loaded at the same time."""
MAX_WAITING = 16
"""Requests that wait or are answered at the same time."""
START_S, TOKEN_S, CANCEL_S = 600.0, 300.0, 2.0
"""Seconds for a model to load, for its next token, and for the last one after a cancel."""


class _Process:
    """A process with one model, which answers one request at a time."""

    def __init__(self, place: str) -> None:
        argv = [sys.executable, "-P", "-m", "align.stages.tools.generate", place]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._buffer = b""
        self.lock = threading.Lock()
        self.users = 0
        self.used = time.monotonic()
        self.ready = False

    def events(self, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the parts of an answer; the lock is held until it ends."""
        if not self.ready:
            _raise_error(self._next(START_S))
            self.ready = True
        self._write(asked)
        while True:
            event = self._next(TOKEN_S)
            _raise_error(event)
            yield event
            if event.get("done"):
                return

    def cancel(self) -> None:
        """End the answer in progress, whose rest is read and dropped, or else the process."""
        self._write({"cancel": True})
        while not {"done", "error"} & self._next(CANCEL_S).keys():
            pass

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def _write(self, told: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise ServeError(503, "The model's process has ended. Try again.") from None

    def _next(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor, end = self._process.stdout.fileno(), time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            part = os.read(descriptor, 65536) if ready else b""
            if not part:
                self._process.kill()
                raise ServeError(503, "The model's process has ended. Try again.")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


def _raise_error(event: Mapping[str, Any]) -> None:
    if "error" in event:
        raise ServeError(400, str(event["error"]), code=str(event["code"]), param="messages")


class Generators:
    """The loaded models of a server.

    Args:
        settings: of the server.
        store: for the models of jobs.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._lock = threading.Lock()
        self._processes: dict[str, _Process] = {}
        self._waiting = 0

    def events(self, person: Person, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the parts of the answer to a request with defaults filled in."""
        with self._store.read() as db:
            place = find_place(db, self._settings, person, name=body["model"])
        if not model_files_exist(place):
            raise ServeError(404, f"The files of {body['model']!r} are gone.", param="model")
        with self._borrowed(place) as process, process.lock:
            ended = False
            try:
                yield from process.events(body)
                ended = True
            except ServeError:
                ended = True
                raise
            finally:
                if not ended:  # the client is gone
                    with suppress(ServeError):
                        process.cancel()

    def complete(self, person: Person, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return a whole answer as the API's object."""
        asked = with_defaults(body)
        texts = [""] * asked["n"]
        reasons = ["stop"] * asked["n"]
        last: dict[str, Any] = {}
        for event in self.events(person, asked):
            if "text" in event:
                texts[event["index"]] += event["text"]
            elif "finish" in event:
                reasons[event["index"]] = event["finish"]
            else:
                last = event
        return {
            "id": new_id("chatcmpl"),
            "object": "chat.completion",
            "created": now(),
            "model": body["model"],
            "choices": [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": None,
                    "finish_reason": reason,
                }
                for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
            ],
            "usage": usage_of(last),
        }

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            for process in self._processes.values():
                process.close()
            self._processes.clear()

    @contextmanager
    def _borrowed(self, place: str) -> Iterator[_Process]:
        """Yield the process of a model, which is not ended during the block."""
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise ServeError(
                    429,
                    f"{MAX_WAITING} requests are waiting for models. Try again.",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": "1"},
                )
            process = self._processes.get(place)
            if process is None or not process.alive:
                self._make_room(place)
                process = self._processes[place] = _Process(place)
            process.users += 1
            self._waiting += 1
        try:
            yield process
        finally:
            with self._lock:
                process.users -= 1
                process.used = time.monotonic()
                self._waiting -= 1

    def _make_room(self, place: str) -> None:
        """End a dead process of this model, and the longest unused one if there are too many."""
        if dead := self._processes.pop(place, None):
            dead.close()
        if len(self._processes) < MAX_MODELS:
            return
        idle = [name for name, process in self._processes.items() if not process.users]
        if not idle:
            raise ServeError(
                429,
                f"{MAX_MODELS} other models are answering. Try again.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "2"},
            )
        self._processes.pop(min(idle, key=lambda name: self._processes[name].used)).close()


def with_defaults(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a process is asked: the request with a value for everything."""
    stop = body.get("stop") or []
    seed = body.get("seed")

    def chosen(key: str, default: object) -> Any:
        return default if body.get(key) is None else body[key]

    return {
        "model": body["model"],
        "messages": [_turn(message) for message in body["messages"]],
        "max_tokens": chosen("max_completion_tokens", chosen("max_tokens", 256)),
        "temperature": chosen("temperature", 1.0),
        "top_p": chosen("top_p", 1.0),
        "n": chosen("n", 1),
        "stop": [stop] if isinstance(stop, str) else stop,
        "seed": secrets.randbelow(2**31) if seed is None else abs(seed) % 2**31,
    }


def _turn(message: Mapping[str, Any]) -> dict[str, str]:
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    # Templates know the older name of this role.
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": content}


def usage_of(last: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of tokens from the last part of an answer."""
    prompt, completion = last.get("prompt_tokens", 0), last.get("completion_tokens", 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
