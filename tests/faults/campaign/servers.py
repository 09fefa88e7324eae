"""Reward servers and judges that break their protocol: counted, bounded in time, never a score."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.faults.campaign import forked
from tests.faults.campaign.ledger import Failed, Fault, Place

DEADLINE_S = 1.0
SLOW_S = 60.0
BIG = 17 * 2**20


def _whole(body: Any, *, status: int = 200) -> bytes:
    from tests.unit.raw_server import whole

    return whole(body, status=status)


def _head(*lines: str) -> bytes:
    return ("HTTP/1.1 200 OK\r\n" + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode()


def _endless() -> Iterator[bytes]:
    yield _head("Content-Type: application/json")
    while True:
        yield b" " * 65536


def _dripping() -> Iterator[bytes]:
    yield _head("Content-Length: 999")
    for _ in range(300):
        time.sleep(0.2)
        yield b" "


BROKEN: dict[str, Any] = {
    **{
        f"status {code}": _whole({"scores": [1.0]}, status=code)
        for code in (204, 401, 404, 500, 503)
    },
    **{f"redirect {code}": _whole(b"", status=code) for code in (301, 302, 307)},
    "nothing": b"",
    "half a status": b"HTTP/1.1 2",
    "no status": b"hello\r\n\r\n",
    "a status of words": b"HTTP/1.1 OK fine\r\n\r\n",
    "binary": bytes(range(256)) * 8,
    "a long header": _head("X: " + "x" * 100_000),
    "many headers": _head(*(f"X{i}: 1" for i in range(500))),
    "a negative length": _head("Content-Length: -5") + b"{}",
    "too short": _head("Content-Length: 500") + b'{"scores": [1.0]}',
    "bad chunks": _head("Transfer-Encoding: chunked") + b"zz\r\n{}\r\n",
    "empty": _whole(b""),
    "cut JSON": _whole(b'{"scores": [1.'),
    "html": _whole(b"<html>no</html>"),
    "not utf-8": _whole(b'{"scores": ["\xff"]}'),
    "deep": _whole(b"[" * 100_000),
    "deep and whole": _whole(b'{"scores": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "large": _whole(b'{"scores": [1.0], "x": "' + b"x" * BIG + b'"}'),
    "endless": _endless,
    "dripping": _dripping,
}
"""Replies that are no answer, by name: bytes, or a function that yields them."""
SCORES: dict[str, Any] = {
    "a text": ["0.5"],
    "true": [True],
    "null": [None],
    "a list": [[1.0]],
    "an object": [{"1": 2}],
    "too many": [1.0, 2.0],
    "none": [],
    "no list": 1.0,
    "a text of scores": "[1.0]",
    "an object of scores": {"0": 1.0},
}
LITERALS = ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" + "0" * 400, "1" * 5000)
MESSAGES: dict[str, Any] = {
    "no choices": {"choices": []},
    "choices null": {"choices": None},
    "choices a text": {"choices": "x"},
    "a choice null": {"choices": [None]},
    "message null": {"choices": [{"message": None}]},
    "content null": {"choices": [{"message": {"content": None}}]},
    "content a list": {"choices": [{"message": {"content": [1, 2]}}]},
    "content an object": {"choices": [{"message": {"content": {"winner": "first"}}}]},
    "content a number": {"choices": [{"message": {"content": 5}}]},
    "no JSON": {"choices": [{"message": {"content": "first wins"}}]},
    "another winner": {"choices": [{"message": {"content": '{"winner": "me"}'}}]},
    "more keys": {"choices": [{"message": {"content": '{"winner": "first", "x": 1}'}}]},
    "a winner twice": {"choices": [{"message": {"content": '{"winner": ["first"]}'}}]},
    "deep": {"choices": [{"message": {"content": "[" * 100_000}}]},
    "usage a text": {"choices": [{"message": {"content": "x"}}], "usage": "many"},
    "usage negative": {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": -1}},
    "an error": {"error": {"message": "\x1b[2J"}},
    "a list": [],
    "null": None,
}


def faults(*, quick: bool) -> Iterator[Fault]:
    """Yield every broken server."""
    literal = {name: _whole(f'{{"scores": [{name}]}}'.encode()) for name in LITERALS}
    scores = {name: _whole({"scores": value}) for name, value in SCORES.items()}
    for name, reply in (BROKEN | literal | scores).items():
        if quick and name not in ("NaN", "deep", "dripping"):
            continue
        inject = partial(_forked, partial(_reward, reply))
        yield Fault("a reward server that breaks the protocol", name[:30], inject)
    messages = {name: _whole(value) for name, value in MESSAGES.items()}
    for name, reply in {} if quick else (BROKEN | messages).items():
        inject = partial(_forked, partial(_judge, reply))
        yield Fault("a judge that breaks the protocol", name, inject)


def _forked(check: Any, place: Place) -> None:
    """Ask in a process of its own, which may hang or grow."""
    place.folder.mkdir()
    began = time.monotonic()
    run = forked.start(check, place.folder)
    (code,) = run.wait(SLOW_S)
    if code != 0:
        raise Failed(
            f"ended with {code} after {time.monotonic() - began:.0f} s: {run.said()[-900:]}"
        )


@contextlib.contextmanager
def _serving(reply: Any) -> Iterator[str]:
    from tests.unit.raw_server import serving

    def parts(_request: Any) -> Iterator[bytes]:
        if callable(reply):
            yield from reply()
        else:
            yield reply

    with serving(parts) as server:
        yield server.url


def _reward(reply: Any) -> None:
    """Ask for one score four times: none may come out, and the failures end the reward in time."""
    from reward_models.remote import RemoteReward, RemoteRewardError

    with _serving(reply) as url:
        ask = RemoteReward(url, deadline_s=DEADLINE_S, retries=1, max_failures=3)
        for _ in range(4):
            try:
                found = ask(prompts=["p"], completions=["c"])
            except RemoteRewardError as e:
                _plain(str(e))
                return
            assert found == [None], found
            assert sum(ask.invalid.values()) > 0
        assert not math.isfinite(ask.disagreement)


def _plain(said: str) -> None:
    """Check that a message can be read at once."""
    assert said
    assert "\n" not in said, said
    assert len(said) < 4000, len(said)


def _judge(reply: Any) -> None:
    """Ask for a verdict: there is none, with a counted reason, or a JudgeError says why."""
    from reward_models.judge import Endpoint, JudgeClient, JudgeError

    schema = {
        "type": "object",
        "properties": {"winner": {"enum": ["first", "second", "tie"]}},
        "required": ["winner"],
        "additionalProperties": False,
    }
    with _serving(reply) as url:
        endpoint = Endpoint(f"{url}/v1", "m", retries=1, timeout_s=DEADLINE_S, deadline_s=9.0)
        client = JudgeClient(endpoint)
        try:
            found = client.ask([[{"role": "user", "content": "which?"}]], schema)
        except JudgeError as e:
            _plain(str(e))
            return
        assert [verdict.value for verdict in found] == [None], json.dumps(str(found))
        assert sum(client.cost.invalid.values()) == 1
