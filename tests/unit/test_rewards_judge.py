"""The client of a judge behind an endpoint, against a small HTTP server of its protocol."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the judge's client is the package openai")

sys.path.insert(0, str(Path(__file__).parent))
from judge_server import Server, running
from raw_server import serving, whole

from reward_models import build_reward, judge
from reward_models.base import MissingColumnError
from reward_models.judge import JudgeClient, JudgeError, follows, read_verdict

SCHEMA = {
    "type": "object",
    "properties": {"winner": {"enum": ["first", "second", "tie"]}},
    "required": ["winner"],
    "additionalProperties": False,
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(judge, "FIRST_WAIT_S", 0.01)
    with running() as served:
        yield served


def say(winner: str) -> dict[str, Any]:
    return {"content": json.dumps({"winner": winner})}


def questions(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_verdicts_come_in_the_order_asked_and_each_question_is_sent_once(server: Server):
    server.reply = lambda request: (200, say(request["messages"][0]["content"]))
    client = JudgeClient(server.endpoint())
    asked = ["first", "tie", "first", "second"]
    found = client.ask(questions(*asked), SCHEMA)
    assert [verdict.value["winner"] for verdict in found] == asked
    assert len(server.seen) == 3
    assert (client.cost.requests, client.cost.prompt_tokens) == (3, 300)
    sent = server.seen[0]
    assert sent["temperature"] == 0
    assert sent["response_format"]["json_schema"]["schema"] == SCHEMA


def test_what_is_no_verdict_is_invalid_with_its_reason(server: Server):
    answers = {
        "refuses": {"refusal": "I cannot judge this."},
        "prose": {"content": "The first one."},
        "other": {"content": '{"winner": "both"}'},
        "more": {"content": '{"winner": "tie", "why": "x"}'},
        "long": {"content": '{"winner": "fir', "finish_reason": "length"},
        "empty": {"content": ""},
    }
    server.reply = lambda request: (200, answers[request["messages"][0]["content"]])
    client = JudgeClient(server.endpoint())
    found = client.ask(questions(*answers), SCHEMA)
    reasons = ["refusal", "not JSON", "schema", "schema", "cut", "not JSON"]
    assert [(verdict.value, verdict.invalid) for verdict in found] == [(None, r) for r in reasons]
    assert client.cost.invalid == {"refusal": 1, "not JSON": 2, "schema": 2, "cut": 1}


def test_cache_answers_a_later_client_and_knows_another_question(server: Server, tmp_path: Path):
    server.reply = lambda request: (200, say("tie"))
    endpoint = server.endpoint(cache=tmp_path, dollars_per_million=(2.0, 10.0))
    JudgeClient(endpoint).ask(questions("a", "b"), SCHEMA)
    later = JudgeClient(endpoint)
    assert [v.value for v in later.ask(questions("a", "b", "c"), SCHEMA)] == [{"winner": "tie"}] * 3
    assert (later.cost.cached, later.cost.requests, len(server.seen)) == (2, 1, 3)
    # One request: 100 prompt tokens at 2 and 10 answer tokens at 10 dollars a million.
    assert later.cost.dollars(endpoint) == pytest.approx(300e-6)
    other = {**SCHEMA, "properties": {"winner": {"enum": ["tie"]}}}
    JudgeClient(endpoint).ask(questions("a"), other)
    assert len(server.seen) == 4


def test_damaged_cache_is_reported_and_not_asked_again(server: Server, tmp_path: Path):
    server.reply = lambda request: (200, say("tie"))
    endpoint = server.endpoint(cache=tmp_path)
    JudgeClient(endpoint).ask(questions("a"), SCHEMA)
    (file,) = tmp_path.rglob("*.json")
    file.write_text('{"content"')
    with pytest.raises(JudgeError, match="delete it"):
        JudgeClient(endpoint).ask(questions("a"), SCHEMA)


def test_a_busy_server_is_asked_again_and_a_dead_one_is_an_error(server: Server, tmp_path: Path):
    turns = iter([(503, {}), (429, {}), (200, say("first"))])
    server.reply = lambda request: next(turns)
    client = JudgeClient(server.endpoint())
    assert client.ask(questions("a"), SCHEMA)[0].value == {"winner": "first"}
    assert client.cost.retries == 2
    server.reply = lambda request: (500, {"error": {"message": "out of order"}})
    with pytest.raises(JudgeError, match=r"no answer after 3 tries.*out of order"):
        client.ask(questions("b"), SCHEMA)


def test_an_error_keeps_what_came_before_it_in_the_cache(server: Server, tmp_path: Path):
    refused = {"error": {"message": "no schema"}}
    server.reply = lambda r: (
        (200, say("tie")) if r["messages"][0]["content"] == "a" else (400, refused)
    )
    endpoint = server.endpoint(cache=tmp_path, concurrency=1)
    with pytest.raises(JudgeError, match=r"rejected.*no schema.*json_schema"):
        JudgeClient(endpoint).ask(questions("a", "b"), SCHEMA)
    later = JudgeClient(endpoint)
    later.ask(questions("a"), SCHEMA)
    assert later.cost.cached == 1


def test_deadline_bounds_the_whole_call(server: Server):
    def slow(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        time.sleep(1.0)
        return 200, say("tie")

    server.reply = slow
    client = JudgeClient(server.endpoint(concurrency=1, deadline_s=0.5))
    began = time.monotonic()
    with pytest.raises(JudgeError, match=r"deadline|no answer"):
        client.ask([q for _ in range(15) for q in questions(*"abcdefgh")], SCHEMA)
    assert time.monotonic() - began < 60.0


def test_concurrency_is_used_and_bounded(server: Server):
    barrier = threading.Barrier(3, timeout=120)

    def together(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        barrier.wait()
        return 200, say("tie")

    server.reply = together
    JudgeClient(server.endpoint(concurrency=3)).ask(questions(*"abcdef"), SCHEMA)
    assert server.most_running == 3


def test_key_comes_from_the_variable_named_and_from_nowhere_else(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    server.reply = lambda request: (200, say("tie"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-another-service")
    monkeypatch.setenv("MY_KEY", "mine")
    JudgeClient(server.endpoint()).ask(questions("a"), SCHEMA)
    JudgeClient(server.endpoint(api_key_env="MY_KEY")).ask(questions("a"), SCHEMA)
    assert server.keys == ["Bearer none", "Bearer mine"]
    with pytest.raises(JudgeError, match="NOT_THERE"):
        JudgeClient(server.endpoint(api_key_env="NOT_THERE"))


@pytest.mark.parametrize(
    ("value", "schema", "holds"),
    [
        (3, {"type": "integer", "minimum": 1, "maximum": 5}, True),
        (6, {"type": "integer", "minimum": 1, "maximum": 5}, False),
        (True, {"type": "integer"}, False),
        (2.5, {"type": "integer"}, False),
        (2.5, {"type": "number"}, True),
        ("x" * 4, {"type": "string", "maxLength": 3}, False),
        ([], {"type": "object"}, False),
        ({}, SCHEMA, False),
    ],
)
def test_schema_check(value: Any, schema: dict[str, Any], holds: bool):
    assert follows(value, schema) is holds


def test_schema_with_an_unchecked_keyword_is_refused():
    with pytest.raises(ValueError, match="pattern"):
        read_verdict({"content": '"a"'}, {"type": "string", "pattern": "b"})


def judge_spec(server: Server, **changes: Any) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    endpoint = {"url": url, "model": "m", "retries": 1, "cache": None}
    return {"kind": "judge", "endpoint": endpoint, "criteria": "Is it kind?", **changes}


def test_judge_reward_places_grades_between_its_ends(server: Server) -> None:
    grades = {"good": 10, "middling": 4, "bad": 1}

    def reply(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked = request["messages"][1]["content"]
        grade = next(grade for word, grade in grades.items() if f"\n{word}\n" in asked)
        return 200, {"content": json.dumps({"score": grade})}

    server.reply = reply
    reward = build_reward(judge_spec(server, reference="answer"))
    said = [[{"role": "assistant", "content": word}] for word in ("bad", "good", "middling")]
    asked = [[{"role": "user", "content": "how?"}]] * 3
    found = reward(prompts=asked, completions=said, answer=["so", "so", "so"])
    assert found == pytest.approx([0.0, 1.0, 3 / 9])
    first = server.seen[0]
    assert first["temperature"] == 0.0
    assert "Is it kind?" in first["messages"][0]["content"]
    assert "<reference_answer>\nso\n" in first["messages"][1]["content"]
    with pytest.raises(MissingColumnError, match="no column 'answer'"):
        reward(prompts=["a"], completions=["b"])


def test_judge_reward_counts_what_is_no_verdict(server: Server) -> None:
    replies = {
        "grade 11": {"content": '{"score": 11}'},
        "refuse": {"content": None, "refusal": "I cannot"},
        "prose": {"content": "nine of ten"},
        "fine": {"content": '{"score": 10}'},
    }
    server.reply = lambda request: (
        200,
        next(v for k, v in replies.items() if f"\n{k}\n" in request["messages"][1]["content"]),
    )
    reward = build_reward(judge_spec(server))
    found = reward(prompts=["q"] * 4, completions=list(replies))
    assert found == [None, None, None, 1.0]
    assert reward.invalid == {"judge: schema": 1, "judge: refusal": 1, "judge: not JSON": 1}


CHOICE = {"message": {"content": '{"winner": "tie"}'}, "finish_reason": "stop"}
MALFORMED = {
    "choices empty": whole({"choices": []}),
    "choices null": whole({"choices": None}),
    "choice a text": whole({"choices": ["tie"]}),
    "no message": whole({"choices": [{"finish_reason": "stop"}]}),
    "null": whole(None),
    "list": whole([CHOICE]),
    "html": whole(b"<html>"),
    "empty": whole(b""),
    "deep": whole(b"[" * 200_000),
    "content a list": whole({"choices": [{"message": {"content": [{"text": "tie"}]}}]}),
}


@pytest.mark.parametrize("reply", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_reply_of_another_protocol_is_counted_and_alone_an_error(reply: bytes):
    def answers(body: dict[str, Any]) -> Iterator[bytes]:
        good = body["messages"][0]["content"] == "good"
        yield whole({"choices": [CHOICE], "usage": None}) if good else reply

    with serving(answers) as http:
        client = JudgeClient(judge.Endpoint(url=f"{http.url}/v1", model="m", retries=0))
        good, bad = client.ask(questions("good", "bad"), SCHEMA)
        assert good.value == {"winner": "tie"}
        assert bad.value is None
        assert client.cost.invalid == {bad.invalid: 1}
        with pytest.raises(JudgeError, match="no reply follows the protocol"):
            client.ask(questions("bad"), SCHEMA)
        assert client.cost.invalid == {bad.invalid: 2}


def test_a_judges_reply_that_drips_or_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judge, "MAX_REPLY_BYTES", 10_000)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
    spec = {"model": "m", "retries": 0, "timeout_s": 0.4}
    with serving(lambda body: iter([head, *[b" "] * 2000]), pause_s=0.05) as http:
        began = time.monotonic()
        with pytest.raises(JudgeError, match="no answer after 1 tries"):
            JudgeClient(judge.Endpoint(url=f"{http.url}/v1", **spec)).ask(questions("a"), SCHEMA)
        assert time.monotonic() - began < 60.0
    spec["timeout_s"] = 20.0
    with serving(lambda body: iter([head, *[b" " * 1000] * 100_000])) as http:
        client = JudgeClient(judge.Endpoint(url=f"{http.url}/v1", **spec))
        with pytest.raises(JudgeError, match="more than 10000 bytes"):
            client.ask(questions("a"), SCHEMA)


def test_a_judge_is_not_followed_to_another_place():
    moved = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
    with serving(lambda body: iter([moved])) as http:
        with pytest.raises(JudgeError, match="rejected"):
            JudgeClient(judge.Endpoint(url=f"{http.url}/v1", model="m")).ask(questions("a"), SCHEMA)
        assert http.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_a_cached_verdict_that_is_no_object_is_reported(server: Server, tmp_path: Path, text: str):
    server.reply = lambda request: (200, say("tie"))
    endpoint = server.endpoint(cache=tmp_path)
    JudgeClient(endpoint).ask(questions("a"), SCHEMA)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(text)
    with pytest.raises(JudgeError, match="delete it"):
        JudgeClient(endpoint).ask(questions("a"), SCHEMA)


@pytest.mark.parametrize("content", ["[" * 200_000, "NaN", '{"winner": NaN}'])
def test_a_verdict_that_cannot_be_read_is_invalid(content: str):
    assert read_verdict({"content": content}, SCHEMA).value is None
