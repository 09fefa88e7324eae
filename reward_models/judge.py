"""Ask a language model behind an OpenAI-compatible endpoint for verdicts in JSON.

A request is sent at temperature 0 with the JSON schema of its answer. Replies are cached on disk by
the hash of the request, so a verdict is paid for once, and an interrupted run continues where it
stopped. A reply that is not a verdict (a refusal, text that violates the schema, a truncated reply)
is invalid with its reason, and never a tie or a 0.
"""

import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, str]]
"""A conversation of ``{"role": ..., "content": ...}`` turns."""
MAX_REPLY_BYTES = 4 * 2**20
"""Largest size of a reply, in bytes."""
FIRST_WAIT_S = 0.5
"""Seconds before the first retry; each further wait is twice as long."""
_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}


class JudgeError(RuntimeError):
    """An endpoint cannot be used or did not answer in time."""


class _MalformedReplyError(ValueError):
    """A reply violates the protocol; the message is the counted reason."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The judge's address and how it is asked.

    Attributes:
        url: base of the API, such as ``http://127.0.0.1:8000/v1``.
        model: name of the model there.
        api_key_env: environment variable that contains the key; None sends none.
        max_tokens: length limit of one verdict, in tokens.
        concurrency: number of simultaneous requests.
        timeout_s: limit of one request.
        deadline_s: limit of one call of `JudgeClient.ask`, including retries.
        retries: number of retries of a request that got no reply, or was deferred (429, 5xx).
        cache: folder of cached verdicts; None disables the cache.
        dollars_per_million: prices of a million prompt tokens and of a million response tokens.
    """

    url: str
    model: str
    api_key_env: str | None = None
    max_tokens: int = 256
    concurrency: int = 8
    timeout_s: float = 60.0
    deadline_s: float = 3600.0
    retries: int = 4
    cache: Path | None = None
    dollars_per_million: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One reply of the judge: its JSON value, or the reason why there is none."""

    value: Mapping[str, Any] | None
    invalid: str | None = None


@dataclass(slots=True)
class Cost:
    """Counters of a client since it was created.

    Attributes:
        requests: number of answered requests.
        cached: number of replies from the cache.
        retries: number of repeated requests.
        prompt_tokens: as counted by the endpoint, without cached replies.
        answer_tokens: likewise.
        seconds: wall time inside `JudgeClient.ask`.
        invalid: replies that were not verdicts, by reason, including cached ones.
    """

    requests: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    invalid: Counter[str] = field(default_factory=Counter)

    def dollars(self, endpoint: Endpoint) -> float:
        """Return the price of all tokens."""
        prompt, answer = endpoint.dollars_per_million
        return (self.prompt_tokens * prompt + self.answer_tokens * answer) / 1e6


class JudgeClient:
    """Ask one endpoint for verdicts.

    Raises:
        JudgeError: the package ``openai`` is missing, or the variable of the key is not set.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.cost = Cost()
        self._lock = threading.Lock()
        self._client = _client(endpoint)

    def ask(self, conversations: Sequence[Messages], schema: Mapping[str, Any]) -> list[Verdict]:
        """Return a verdict on each conversation; equal conversations are asked once.

        Args:
            conversations: what the judge reads.
            schema: JSON schema of a verdict: an object of strings, numbers and enumerations.

        Raises:
            JudgeError: the endpoint rejects the request, cannot be reached, sends only replies of
                another protocol, or ``deadline_s`` is over. Earlier verdicts stay in the cache.
        """
        began = time.monotonic()
        # By the hash of the request: equal ones are sent once.
        wanted = {self._key(messages, schema): messages for messages in conversations}
        pool = ThreadPoolExecutor(max(1, min(self.endpoint.concurrency, len(wanted))))
        try:
            jobs = {
                key: pool.submit(self._answer, key, messages, schema, began=began)
                for key, messages in wanted.items()
            }
            answers = {key: job.result() for key, job in jobs.items()}
        finally:
            # After an error, requests that have not started would only cost money.
            pool.shutdown(cancel_futures=True)
            self.cost.seconds += time.monotonic() - began
        found = [
            read_verdict(answers[self._key(messages, schema)], schema) for messages in conversations
        ]
        self.cost.invalid.update(v.invalid for v in found if v.invalid)
        # A few malformed replies are invalid verdicts; only malformed ones mean a wrong endpoint.
        malformed = [answer["malformed"] for answer in answers.values() if "malformed" in answer]
        if malformed and len(malformed) == len(answers):
            raise JudgeError(
                f"{self._where}: no reply follows the protocol ({malformed[0]}); expected an "
                "OpenAI-compatible chat completion with choices"
            )
        return found

    def _key(self, messages: Messages, schema: Mapping[str, Any]) -> str:
        text = json.dumps(
            [self.endpoint.url, self._request(messages, schema)], sort_keys=True, ensure_ascii=False
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _request(self, messages: Messages, schema: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model": self.endpoint.model,
            "messages": [dict(turn) for turn in messages],
            "temperature": 0.0,
            "max_tokens": self.endpoint.max_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "schema": dict(schema), "strict": True},
            },
        }

    def _answer(
        self, key: str, messages: Messages, schema: Mapping[str, Any], *, began: float
    ) -> dict[str, Any]:
        place = self.endpoint.cache / key[:2] / f"{key}.json" if self.endpoint.cache else None
        if place is not None and (known := _read(place)) is not None:
            with self._lock:
                self.cost.cached += 1
            return known
        try:
            answer = self._send(self._request(messages, schema), began)
        except _MalformedReplyError as error:
            return {"malformed": str(error)}
        if place is not None:
            _write(place, answer)
        return answer

    @property
    def _where(self) -> str:
        return f"judge {self.endpoint.model} at {self.endpoint.url}"

    def _send(self, request: Mapping[str, Any], began: float) -> dict[str, Any]:
        """Send one request until it is answered; return what the cache stores."""
        import openai

        later = (
            *(openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError),
            *(*_transport_errors(), TimeoutError),
        )
        where = self._where
        for attempt in range(self.endpoint.retries + 1):
            left = self.endpoint.deadline_s - (time.monotonic() - began)
            if left <= 0:
                raise JudgeError(
                    f"{where}: deadline of {self.endpoint.deadline_s:g} s is over. Raise "
                    "deadline_s or concurrency. "
                    "With a cache, run the same command again to continue."
                )
            try:
                return self._counted(self._exchange(request, min(self.endpoint.timeout_s, left)))
            # Overload and broken connections pass; other errors are about the request itself.
            except later as error:
                if attempt == self.endpoint.retries:
                    raise JudgeError(
                        f"{where}: no answer after {attempt + 1} tries ({_reason(error)}). Check "
                        "the server. With a cache, run the same command again to continue."
                    ) from error
                with self._lock:
                    self.cost.retries += 1
                time.sleep(min(FIRST_WAIT_S * 2**attempt, max(0.0, left)))
            except openai.OpenAIError as error:
                raise JudgeError(
                    f"{where}: the request was rejected ({_reason(error)}); expected an "
                    "OpenAI-compatible endpoint that supports response_format json_schema"
                ) from error
        raise AssertionError("the last try returns or raises")

    def _exchange(self, request: Mapping[str, Any], limit_s: float) -> Any:
        """Send one request and return the JSON value of its reply, within the time limit."""
        end, text = time.monotonic() + limit_s, bytearray()
        streaming = self._client.chat.completions.with_streaming_response
        with streaming.create(**request, timeout=limit_s) as reply:
            for part in reply.iter_bytes():
                text += part
                if len(text) > MAX_REPLY_BYTES:
                    raise _MalformedReplyError(f"reply: more than {MAX_REPLY_BYTES} bytes")
                # The client's own timeout restarts with every part.
                if time.monotonic() > end:
                    raise TimeoutError(f"no whole reply within {limit_s:.1f} s")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _MalformedReplyError("reply: not JSON") from error

    def _counted(self, reply: object) -> dict[str, Any]:
        """Return the part of a reply that the cache stores.

        Raises:
            _MalformedReplyError: the reply violates the protocol.
        """
        usage = reply.get("usage") if isinstance(reply, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        with self._lock:
            self.cost.requests += 1
            # Counted before the reply is checked: a malformed one was paid for, too.
            self.cost.prompt_tokens += _count(usage.get("prompt_tokens"))
            self.cost.answer_tokens += _count(usage.get("completion_tokens"))
        choices = reply.get("choices") if isinstance(reply, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            raise _MalformedReplyError("reply: no choices with a message")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise _MalformedReplyError(f"reply: content is a {type(content).__name__}")
        return {
            "content": content,
            "refusal": message.get("refusal"),
            "finish_reason": choice.get("finish_reason"),
        }


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return the base errors of the HTTP libraries that openai may use: httpx or httpx2."""
    present = [name for name in ("httpx", "httpx2") if find_spec(name) is not None]
    return tuple(import_module(name).HTTPError for name in present)


def _count(tokens: object) -> int:
    return tokens if type(tokens) is int and tokens > 0 else 0


def _client(endpoint: Endpoint) -> Any:
    try:
        from openai import DefaultHttpxClient, OpenAI
    except ImportError as error:
        raise JudgeError(
            "a judge behind an endpoint needs the package openai. Run: pip install openai"
        ) from error
    key = os.environ.get(endpoint.api_key_env) if endpoint.api_key_env else "none"
    if key is None:
        raise JudgeError(f"the environment variable {endpoint.api_key_env} (api_key_env) is unset")
    return OpenAI(
        base_url=endpoint.url,
        api_key=key,
        # Retries are counted and limited by the deadline here, not in the client.
        max_retries=0,
        http_client=DefaultHttpxClient(follow_redirects=False),
    )


def _reason(error: Exception) -> str:
    cause = f": {error.__cause__}" if error.__cause__ else ""
    return f"{type(error).__name__}: {error}{cause}"[:300]


def read_verdict(answer: Mapping[str, Any], schema: Mapping[str, Any]) -> Verdict:
    """Return the verdict of a reply, or why there is none.

    Reasons are ``refusal``, ``cut``, ``not JSON``, ``schema`` and those of a malformed reply.
    """
    if "malformed" in answer:
        return Verdict(None, answer["malformed"])
    if answer.get("refusal") or answer.get("finish_reason") == "content_filter":
        return Verdict(None, "refusal")
    if answer.get("finish_reason") == "length":
        return Verdict(None, "cut")
    try:
        value = json.loads(answer.get("content") or "")
    except (ValueError, TypeError, RecursionError):
        return Verdict(None, "not JSON")
    return Verdict(value) if follows(value, schema) else Verdict(None, "schema")


def follows(value: object, schema: Mapping[str, Any]) -> bool:
    """Return whether a value follows a verdict schema.

    Raises:
        ValueError: the schema uses an unsupported keyword.
    """
    known = {
        "type",
        "properties",
        "required",
        "additionalProperties",
        "enum",
        "minimum",
        "maximum",
        "description",
        "maxLength",
    }
    if surplus := set(schema) - known:
        raise ValueError(
            f"verdict schema: keywords {sorted(surplus)} are not supported; remove them"
        )
    if "enum" in schema and value not in schema["enum"]:
        return False
    if schema.get("type") == "object":
        parts = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", ())) <= set(value) <= set(parts)
            and all(follows(value[name], parts[name]) for name in value)
        )
    allowed = _TYPES.get(schema.get("type", ""))
    if allowed and type(value) not in allowed:  # exact types, since bool is a subclass of int
        return False
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", len(value))
    low, high = schema.get("minimum", value), schema.get("maximum", value)
    return not isinstance(value, int | float) or low <= value <= high


def _read(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise JudgeError(f"{place}: a cached verdict is not JSON ({error}); delete it") from error
    if not isinstance(found, dict):
        raise JudgeError(
            f"{place}: a cached verdict is a {type(found).__name__}, expected an object; delete it"
        )
    return found


def _write(place: Path, answer: Mapping[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: several processes may share a cache.
    temporary = place.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(answer, ensure_ascii=False), encoding="utf-8")
    temporary.replace(place)
