"""A learned reward behind HTTP; concurrent requests are scored in one batch."""

import asyncio
import json
import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from reward_models.base import InvalidScoreError

if TYPE_CHECKING:
    from fastapi import Request

MAX_ROWS = 1024
"""Largest number of responses in one request."""
MAX_BYTES = 16 * 2**20
"""Largest size of one request."""
BATCH_ROWS = 512
"""Largest number of responses scored together."""
WAIT_S = 0.005
"""Seconds that the first request of a batch waits for others."""
READ_TIMEOUT_S = 30.0
"""Seconds within which a request must arrive."""
MAX_WAITING = 64
"""Largest number of waiting requests; further ones must be retried by the client."""
FIELDS = ("prompts", "completions", "prompt_ids", "completion_ids")


class Scorer(Protocol):
    """Score rows; see `reward_models.base.RewardFunction`."""

    name: str
    disagreement: float

    def __call__(
        self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Return one score per completion."""
        ...


class BadRequestError(ValueError):
    """A request cannot be scored; the message is sent to the client."""


class Batcher:
    """Score requests in one thread; waiting requests are combined in one call."""

    def __init__(self, reward: Scorer) -> None:
        self._reward = reward
        self._waiting: queue.Queue[tuple[Mapping[str, list[Any]], Future[dict[str, Any]]]]
        self._waiting = queue.Queue(MAX_WAITING)
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, body: Mapping[str, list[Any]]) -> Future[dict[str, Any]]:
        """Queue a validated request.

        Raises:
            queue.Full: too many requests are waiting.
        """
        done: Future[dict[str, Any]] = Future()
        self._waiting.put_nowait((body, done))
        return done

    def _run(self) -> None:
        while True:
            # Wait for a first request, then a few milliseconds for others to share its forward
            # pass.
            batch = [self._waiting.get()]
            rows, until = len(batch[0][0]["completions"]), time.monotonic() + WAIT_S
            while rows < BATCH_ROWS and (left := until - time.monotonic()) > 0:
                try:
                    batch.append(self._waiting.get(timeout=left))
                except queue.Empty:
                    break
                rows += len(batch[-1][0]["completions"])
            # Requests with and without token ids cannot share a call.
            for with_ids in (False, True):
                alike = [item for item in batch if ("prompt_ids" in item[0]) == with_ids]
                if alike:
                    self._score(alike)

    def _score(
        self, batch: Sequence[tuple[Mapping[str, list[Any]], Future[dict[str, Any]]]]
    ) -> None:
        names = [name for name in FIELDS if name in batch[0][0]]
        joined = {name: [x for body, _ in batch for x in body[name]] for name in names}
        try:
            scores = self._reward(**joined)
        # Any error of the scorer is sent to the client, and the server continues.
        except Exception as error:
            if len(batch) > 1:  # one bad request must not fail the others
                for item in batch:
                    self._score([item])
                return
            batch[0][1].set_exception(error)
            return
        spread = self._reward.disagreement
        start = 0
        for body, done in batch:
            mine = scores[start : start + len(body["completions"])]
            start += len(mine)
            found = {"scores": mine, "disagreement": spread if math.isfinite(spread) else None}
            done.set_result(found)


def read_request(data: bytes) -> dict[str, list[Any]]:
    """Validate the body of a request.

    Raises:
        BadRequestError: says what is wrong.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON ({error})") from error
    needed, known = {"prompts", "completions"}, {*FIELDS, "columns"}
    if not isinstance(body, dict) or not needed <= set(body) <= known:
        raise BadRequestError(
            "expected an object with prompts, completions and, if known, prompt_ids, "
            "completion_ids, columns"
        )
    body.pop("columns", None)  # for custom servers; a scorer reads only the texts
    if ("prompt_ids" in body) != ("completion_ids" in body):
        raise BadRequestError("prompt_ids and completion_ids must be sent together")
    # Lists with one entry for each response.
    lengths = {name: len(v) if isinstance(v, list) else -1 for name, v in body.items()}
    if len(set(lengths.values())) != 1 or -1 in lengths.values():
        raise BadRequestError(f"expected lists of equal length, found {lengths} (-1: not a list)")
    if not 1 <= lengths["completions"] <= MAX_ROWS:
        raise BadRequestError(f"{lengths['completions']} responses; expected 1 to {MAX_ROWS}")
    # What the entries are.
    for name in ("prompts", "completions"):
        if not all(isinstance(x, str) or _is_turns(x) for x in body[name]):
            raise BadRequestError(f"{name}: expected texts or lists of turns {{role, content}}")
        if not all(_is_encodable(x) for x in body[name]):
            raise BadRequestError(
                f"{name}: a text contains half of a surrogate pair, which is not a character"
            )
    if not all(isinstance(x, str) or _has_answer(x) for x in body["completions"]):
        raise BadRequestError("completions: expected an assistant turn among the turns")
    for name in ("prompt_ids", "completion_ids"):
        if name in body and not all(_is_ids(x) for x in body[name]):
            raise BadRequestError(
                f"{name}: expected lists of token ids, integers from 0, not empty"
            )
    return body


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, dict)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in value
    )


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(x) is int and x >= 0 for x in value)


def _is_encodable(value: str | Sequence[Mapping[str, Any]]) -> bool:
    texts = [value] if isinstance(value, str) else [turn["content"] for turn in value]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_answer(turns: Sequence[Mapping[str, Any]]) -> bool:
    return any(turn["role"] == "assistant" for turn in turns)


def _parsed(data: bytes, *, takes_ids: bool) -> dict[str, Any]:
    """Return the parsed request.

    Raises:
        BadRequestError: it is malformed, or has token ids for a scorer that reads texts.
    """
    body = read_request(data)
    if not takes_ids and "prompt_ids" in body:
        raise BadRequestError(
            "this reward model is an encoder and reads texts. Do not send token ids "
            "(token_ids: false)"
        )
    return body


async def _body(request: "Request") -> bytes | None:
    """Return a request's body; None if it has more than ``MAX_BYTES``.

    Raises:
        TimeoutError: it did not arrive in time.
    """
    data = bytearray()
    async with asyncio.timeout(READ_TIMEOUT_S):
        async for part in request.stream():
            data += part
            if len(data) > MAX_BYTES:
                return None
    return bytes(data)


def build_app(reward: Scorer, about: Mapping[str, Any], *, takes_ids: bool = True) -> Any:
    """Return the web application: ``GET /health`` returns ``about``, ``POST /score`` scores.

    Args:
        reward: the scorer.
        about: its description.
        takes_ids: False if it only reads texts; requests with token ids are then rejected.

    Raises:
        ImportError: fastapi is not installed.
    """
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect

    app = FastAPI(title="align reward", docs_url=None, redoc_url=None, openapi_url=None)
    batcher = Batcher(reward)

    def refuse(code: int, said: str) -> JSONResponse:
        return JSONResponse({"error": said}, status_code=code)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", **about}

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        try:
            data = await _body(request)
        except TimeoutError:
            return refuse(408, f"the request did not arrive within {READ_TIMEOUT_S:g} s")
        except ClientDisconnect:
            return refuse(400, "the client disconnected")
        if data is None:
            return refuse(413, f"more than {MAX_BYTES} bytes; send fewer responses")
        try:
            future = batcher.submit(_parsed(data, takes_ids=takes_ids))
            return JSONResponse(await asyncio.wrap_future(future))
        except (ValueError, InvalidScoreError) as error:  # a request that cannot be scored
            return refuse(422, str(error))
        except queue.Full:
            return refuse(503, f"{MAX_WAITING} requests are already waiting")
        except Exception as error:
            return refuse(500, f"{type(error).__name__}: {error}")

    return app
