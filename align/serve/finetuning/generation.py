"""Processes that generate text: started for the first request, ended when others need the room."""

import itertools
import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

from align.serve.auth import Person
from align.serve.errors import ServeError
from align.serve.finetuning.adapters import MAX_RANK
from align.serve.finetuning.common import new_id, now
from align.serve.finetuning.models import find_place
from align.serve.settings import Settings
from align.serve.store import Store

MAX_MODELS = 2
"""Base models that are loaded at the same time."""
MAX_WAITING = 64
"""Requests that wait or are answered at the same time."""
START_S, TOKEN_S = 600.0, 300.0
"""Seconds for a model to load, and for the next token of any answer."""
GONE = "The model's process has ended. Try again."


class _Process:
    """A process with one base model, which answers requests with any of its adapters.

    A thread reads its output and hands each part to the request that it belongs to.

    Args:
        argv: its command line.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._writing = threading.Lock()
        self._numbers = itertools.count()
        self._answers: dict[int, SimpleQueue[dict[str, Any]]] = {}
        self._heard = time.monotonic()
        self._loaded = threading.Event()
        self._problem: dict[str, Any] | None = None
        self.users = 0
        self.used = time.monotonic()
        threading.Thread(target=self._read, daemon=True).start()

    def events(self, asked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the parts of an answer; a reader that leaves ends it.

        Raises:
            ServeError: the model cannot be loaded or respond.
        """
        if not self._loaded.wait(START_S):
            self._process.kill()
        if self._problem is not None:
            _raise_error(self._problem)
        number, answers = next(self._numbers), SimpleQueue[dict[str, Any]]()
        self._answers[number] = answers
        began, ended = time.monotonic(), False
        try:
            self._write({**asked, "id": number})
            while not ended:
                event = self._next(answers, began)
                ended = bool({"done", "error"} & event.keys())
                _raise_error(event)
                yield event
        finally:
            del self._answers[number]
            if not ended:  # the client is gone
                with suppress(ServeError):
                    self._write({"cancel": number})

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def _write(self, told: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            with self._writing:
                self._process.stdin.write(json.dumps(told).encode() + b"\n")
                self._process.stdin.flush()
        except (OSError, ValueError):
            raise ServeError(503, GONE) from None

    def _next(self, answers: "SimpleQueue[dict[str, Any]]", began: float) -> dict[str, Any]:
        """Return the next part of an answer; others may be before it in the process.

        Raises:
            ServeError: the process has ended, or has not said anything for too long.
        """
        while True:
            try:
                return answers.get(timeout=1.0)
            except Empty:
                if time.monotonic() - max(self._heard, began) > TOKEN_S:
                    self._process.kill()
                if not self.alive and answers.empty():
                    raise ServeError(503, GONE) from None

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._heard = time.monotonic()
                event = json.loads(line)
                if not self._loaded.is_set():
                    self._problem = event if "error" in event else None
                    self._loaded.set()
                elif (answers := self._answers.get(event.pop("id"))) is not None:
                    answers.put(event)
        if not self._loaded.is_set():
            self._problem = {"error": GONE, "code": "model_not_loaded"}
            self._loaded.set()


def _raise_error(event: Mapping[str, Any]) -> None:
    if event.get("error") == GONE:
        raise ServeError(503, GONE)
    if "error" in event:
        raise ServeError(400, str(event["error"]), code=str(event["code"]), param="messages")


def command(place: str, engine: str) -> list[str]:
    """Return the command line of a process with the model in a place."""
    argv = [sys.executable, "-P", "-m", "align.stages.tools.generate", place]
    return [*argv, "--engine", engine, "--max-rank", str(MAX_RANK)]


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

    def events(self, person: Person, body: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """Yield the parts of the answer to a request with defaults filled in."""
        with self._store.read() as db:
            place = find_place(db, self._settings, person, name=body["model"])
        if not place.exists():
            raise ServeError(404, f"The files of {body['model']!r} are gone.", param="model")
        with self._borrowed(place.model) as process:
            yield from process.events({**body, **place.parts()})

    def complete(self, person: Person, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return a whole answer as the API's object."""
        asked = with_defaults(body)
        texts = [""] * asked["n"]
        reasons = ["stop"] * asked["n"]
        entries: list[list[Any]] = [[] for _ in texts]
        last: dict[str, Any] = {}
        for event in self.events(person, asked):
            if "logprobs" in event:
                entries[event["index"]] += event["logprobs"]
            elif "text" in event:
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
                    "logprobs": logprobs_object(entries[i], asked),
                    "finish_reason": reason,
                }
                for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
            ],
            "usage": usage_of(last),
        }

    def close_idle(self, idle_s: float = 0.0) -> None:
        """End the processes that nobody has asked for some time."""
        before = time.monotonic() - idle_s
        with self._lock:
            for place, process in list(self._processes.items()):
                if not process.users and process.used <= before:
                    self._processes.pop(place).close()

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
                process = self._processes[place] = _Process(command(place, self._settings.engine))
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
        "logprobs": chosen("top_logprobs", 0) if body.get("logprobs") else None,
        "stop": [stop] if isinstance(stop, str) else stop,
        "seed": secrets.randbelow(2**31) if seed is None else abs(seed) % 2**31,
    }


def logprobs_object(entries: list[Any], asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the log-probabilities of a choice as the API's object; None if not asked for."""
    return None if asked["logprobs"] is None else {"content": entries, "refusal": None}


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
