"""The reward behind HTTP: query a server started by ``align serve-reward``, or a custom one.

Only the standard library is needed. A failed request is retried with growing waits until the
deadline, which covers the whole exchange, so a slowly dripping reply is cut off. Redirects are not
followed. If the server cannot be reached when the reward is built, this is an error before
training. A later failure makes responses invalid a few times, and then ends the stage.
"""

import http.client
import json
import logging
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from email.message import Message
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from reward_models.base import Text, a_type, check_rows, column_values, finite_score
from reward_models.specs import RemoteSpec

log = logging.getLogger(__name__)
FIRST_WAIT_S = 0.2
"""Seconds before the first retry; each further wait is twice as long."""
ROWS_PER_REQUEST = 256
MAX_ANSWER_BYTES = 16 * 2**20
"""Largest size of a reply, in bytes."""
FAILURES = (OSError, ValueError, http.client.HTTPException, RecursionError)
"""Errors that can end an exchange with a server."""


class RemoteRewardError(RuntimeError):
    """A reward server cannot be used."""


class _Refused(Exception):
    """A server rejected a request; sending it again would not help."""


class RemoteReward:
    """Score responses on a server.

    Texts are sent, and the server renders them with the scorer's own template. With ``token_ids``,
    the sampled ids are sent too and are scored, which is exact if both sides share a tokenizer. The
    row's own columns are sent as ``columns``. Only finite numbers count as scores.

    Attributes:
        disagreement: of the last call, as reported by the server; NaN for a single head.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = 60.0,
        retries: int = 4,
        max_failures: int = 3,
        token_ids: bool = False,
        name: str = "remote",
        weight: float = 1.0,
    ) -> None:
        self.url = url.rstrip("/")
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise RemoteRewardError(
                f"reward '{name}': url {url!r} is not an address; expected http://HOST:PORT"
            )
        self.deadline_s = deadline_s
        self.retries = retries
        self.max_failures = max_failures
        self.token_ids = token_ids
        self.name = name
        self.__name__ = name
        self.weight = weight
        self.invalid: Counter[str] = Counter()
        self.disagreement = math.nan
        self._failures = 0
        try:
            self.server = self._ask("/health", None)
        except (_Refused, *FAILURES) as error:
            raise RemoteRewardError(
                f"reward '{name}': no reward server at {self.url} ({_reason(error)}). Start one "
                "with 'align serve-reward RUN/STAGE' and set url to its address."
            ) from error

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Score each response.

        Raises:
            RemoteRewardError: the server rejects the request, or ``max_failures`` calls in a row
                got no reply.
        """
        check_rows(prompts, completions, reward=self.name)
        body: dict[str, Sequence[Any]] = {
            "prompts": list(prompts),
            "completions": list(completions),
        }
        if self.token_ids:
            for column in ("prompt_ids", "completion_ids"):
                body[column] = column_values(
                    columns, column, reward=self.name, num_rows=len(completions)
                )
        own = {k: v for k, v in columns.items() if k not in ("prompt_ids", "completion_ids")}
        scores: list[float | None] = []
        spreads: list[float] = []
        for start in range(0, len(completions), ROWS_PER_REQUEST):
            here = slice(start, start + ROWS_PER_REQUEST)
            # In parts: the server limits the rows and bytes of a request.
            part: dict[str, Any] = {k: list(v[here]) for k, v in body.items()}
            if own:
                part["columns"] = {k: _plain(list(v[here])) for k, v in own.items()}
            found, spread = self._scored(part)
            scores += found
            if spread is not None:
                spreads.append(spread)
        self.disagreement = sum(spreads) / len(spreads) if spreads else math.nan
        return scores

    def _scored(self, part: Mapping[str, Any]) -> tuple[list[float | None], float | None]:
        """Return the scores of one request (invalid ones if it failed) and their spread."""
        num_rows = len(part["completions"])
        try:
            answer = self._ask("/score", part)
            given = answer.get("scores")
            if not isinstance(given, list) or len(given) != num_rows:
                size = len(given) if isinstance(given, list) else type(given).__name__
                raise ValueError(f"{size} scores for {num_rows} answers")
        except _Refused as error:
            raise RemoteRewardError(
                f"reward '{self.name}': {self.url} rejected the request: {error}"
            ) from error
        except FAILURES as error:
            self._failures += 1
            reason = f"server: {type(error).__name__}"
            self.invalid[reason] += num_rows
            if self._failures >= self.max_failures:
                raise RemoteRewardError(
                    f"reward '{self.name}': {self.url} did not answer {self._failures} times in a "
                    f"row ({_reason(error)}). Check the server, then run the stage again."
                ) from error
            return [None] * num_rows, None
        # A reply resets the count of consecutive failures.
        self._failures = 0
        scores = [finite_score(score) for score in given]
        for score, said in zip(scores, given, strict=True):
            if score is None:
                self.invalid[_fault(said)] += 1
        return scores, finite_score(answer.get("disagreement"))

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Send a request until it is answered or ``retries`` or the deadline are exhausted."""
        data = None if body is None else json.dumps(body, default=str).encode()
        end = time.monotonic() + self.deadline_s
        for attempt in range(self.retries + 1):
            try:
                return self._exchange(path, data, max(end - time.monotonic(), 0.01))
            except (OSError, http.client.HTTPException) as error:
                wait = FIRST_WAIT_S * 2**attempt
                if attempt == self.retries or time.monotonic() + wait >= end:
                    raise
                reason = _reason(error)
            log.info("reward %s: %s; retrying in %.1f s", self.name, reason, wait)
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _exchange(self, path: str, data: bytes | None, limit_s: float) -> dict[str, Any]:
        """Send one request and read its reply, within the time limit.

        Raises:
            _Refused: the server says that the request is invalid.
            OSError, HTTPException, ValueError, RecursionError: there is no readable reply.
        """
        address = urlsplit(self.url)
        secure = address.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(address.netloc.rpartition("@")[2], timeout=limit_s)
        began = time.monotonic()
        connection.connect()
        # A socket timeout restarts with every byte; this timer ends the whole exchange.
        cut = threading.Timer(limit_s, _shut, [connection.sock])
        cut.start()
        try:
            method = "GET" if data is None else "POST"
            # One connection per request, so a restarted server needs no special case.
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request(method, address.path + path, body=data, headers=headers)
            answer = connection.getresponse()
            text = answer.read(MAX_ANSWER_BYTES + 1)
            # With a limit, a body that ends too soon is not an error of the library's.
            if answer.length and len(text) <= MAX_ANSWER_BYTES:
                raise http.client.IncompleteRead(text, answer.length)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() - began >= limit_s:
                raise TimeoutError(f"no whole answer within {limit_s:.1f} s") from error
            raise
        finally:
            cut.cancel()
            connection.close()
        if time.monotonic() - began >= limit_s:
            raise TimeoutError(f"no whole answer within {limit_s:.1f} s")
        return _read_answer(answer.status, text)


def _read_answer(status: int, text: bytes) -> dict[str, Any]:
    said = text[:2000].decode(errors="replace")
    if 300 <= status < 400:
        raise _Refused(f"{status}: redirects are not followed; set url to the final address")
    if status >= 500 or status == 429:
        # As an error of the transport, after which the request is sent again.
        raise HTTPError("", status, said[:200], Message(), None)
    if status != 200:
        raise _Refused(f"{status}: {said}")
    if len(text) > MAX_ANSWER_BYTES:
        raise ValueError(f"more than {MAX_ANSWER_BYTES} bytes of answer")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object with scores, found {a_type(found)}")
    return found


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # the other side closed first
        return


def _fault(score: object) -> str:
    """Return the counted reason why a value is not a score."""
    if score is None:
        return "server: invalid"
    if isinstance(score, int | float) and not isinstance(score, bool):
        return "server: score is not finite"
    return f"server: score is {a_type(score)}"


def _plain(value: object) -> Any:
    """Return a column's value for JSON; non-finite numbers become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def build_remote(spec: RemoteSpec) -> RemoteReward:
    """Connect to the server of a spec.

    Raises:
        RemoteRewardError: it cannot be reached.
    """
    return RemoteReward(
        spec.url,
        deadline_s=spec.deadline_s,
        retries=spec.retries,
        max_failures=spec.max_failures,
        token_ids=spec.token_ids,
        name=spec.label,
        weight=spec.weight,
    )
