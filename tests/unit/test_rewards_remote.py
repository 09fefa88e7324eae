"""A reward behind HTTP: a real server process on this machine, and what happens without one."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import repeat
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

from align.core.artifacts import write_manifest
from reward_models import build_reward
from reward_models.remote import RemoteRewardError
from reward_models.scalar import RewardModel
from reward_models.serving import BadRequestError, read_request

sys.path.insert(0, str(Path(__file__).parent))
from raw_server import serving, whole

LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "serve_reward.py"
WORDS = ["<pad>", "<eos>", "hi", "yes", "no", "a", "b"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny reward artifact with two heads."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("served")
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = RewardModel(AutoModel.from_config(config), 32, num_heads=2)
    model.set_normalization(mean=[0.1, 0.2], std=[2.0, 3.0])
    model.save(folder / "model", tokenizer=tokenizer)
    write_manifest(folder, {"kind": "reward_model", "spec_hash": "0" * 8, "data": []})
    return folder


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[str]:
    """Run the server as its own process."""
    port = free_port()
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, str(LAUNCH), str(artifact), "--port", str(port)],
        env=env | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 300.0
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1.0).read()
            break
        except OSError:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) is not None


TEXTS = {"prompts": ["hi", "hi a", "b"], "completions": ["yes", "no no a", "yes b <eos>"]}
IDS = {"prompt_ids": [[2], [2, 5], [6]], "completion_ids": [[3, 1], [4, 4, 5, 1], [3, 6, 1]]}


def test_served_scores_are_those_of_the_same_process(artifact: Path, server: str):
    here = build_reward({"kind": "scalar", "model": str(artifact / "model")})
    there = build_reward({"kind": "remote", "url": server})
    by_ids = build_reward({"kind": "remote", "url": server, "token_ids": True})
    expected = here(**TEXTS)
    assert there(**TEXTS) == pytest.approx(expected, abs=1e-6)
    assert there.disagreement == pytest.approx(here.disagreement, abs=1e-6)
    assert by_ids(**TEXTS, **IDS) == pytest.approx(here(**TEXTS, **IDS), abs=1e-6)
    assert there.server["heads"] == 2


def test_many_clients_at_once_each_get_their_own_scores(artifact: Path, server: str):
    here = build_reward({"kind": "scalar", "model": str(artifact / "model")})
    there = build_reward({"kind": "remote", "url": server})
    words = ["yes", "no", "a", "b"]
    found: dict[int, list] = {}

    def ask(i: int) -> None:
        said = [" ".join(words[: 1 + (i + k) % 4]) for k in range(1 + i % 3)]
        found[i] = [said, there(prompts=["hi"] * len(said), completions=said)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 16
    for said, scores in found.values():
        expected = here(prompts=["hi"] * len(said), completions=said)
        assert scores == pytest.approx(expected, abs=1e-5)


def post(url: str, data: bytes) -> tuple[int, str]:
    request = urllib.request.Request(f"{url}/score", data=data)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_server_refuses_what_is_no_request_and_goes_on(server: str):
    assert post(server, b"{")[0] == 422
    code, said = post(server, json.dumps({"prompts": ["a"], "completions": []}).encode())
    assert code == 422
    assert "equal length" in said
    unknown = {
        "prompts": ["a"],
        "completions": ["a"],
        "prompt_ids": [[2]],
        "completion_ids": [[999]],
    }
    code, said = post(server, json.dumps(unknown).encode())
    assert code == 422
    assert "another tokenizer" in said
    assert post(server, b" " * (17 * 2**20))[0] == 413
    assert post(server, json.dumps(TEXTS).encode())[0] == 200
    reward = build_reward({"kind": "remote", "url": server})
    with pytest.raises(RemoteRewardError, match="rejected the request: 422"):
        reward(prompts=["a"], completions=[3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "body",
    [
        {"prompts": "ab", "completions": "ab"},
        {"prompts": [], "completions": []},
        {"prompts": [1], "completions": ["a"]},
        {"prompts": ["a"], "completions": ["a"], "prompt_ids": [[1]]},
        {"prompts": ["a"], "completions": ["a"], "prompt_ids": [[-1]], "completion_ids": [[1]]},
        {"prompts": ["a"], "completions": ["a"], "model": "x"},
        {"prompts": ["a"] * 1025, "completions": ["a"] * 1025},
        {"prompts": ["a"], "completions": ["a"], "prompt_ids": [[]], "completion_ids": [[]]},
        {"prompts": ["a"], "completions": ["half \ud83d"]},
        {"prompts": ["a"], "completions": [[{"role": "user", "content": "a"}]]},
        {"prompts": ["a"], "completions": [[]]},
    ],
)
def test_requests_are_checked(body: dict):
    with pytest.raises(BadRequestError):
        read_request(json.dumps(body).encode())


def test_a_body_that_is_nested_too_deep_is_a_bad_request():
    with pytest.raises(BadRequestError, match="not JSON"):
        read_request(b"[" * 200_000)


def test_columns_of_the_row_are_taken_and_left_out():
    body = {"prompts": ["a"], "completions": ["b"], "columns": {"answer": ["c"]}}
    assert set(read_request(json.dumps(body).encode())) == {"prompts", "completions"}


def test_server_answers_invalid_for_a_text_beyond_its_positions(server: str):
    code, said = post(
        server, json.dumps({"prompts": ["hi", "hi"], "completions": ["no " * 500, "no"]}).encode()
    )
    long, short = json.loads(said)["scores"]
    assert (code, long, type(short)) == (200, None, float)


SCORES = [
    (0.5, 0.5, None),
    (2, 2.0, None),
    ("0.5", None, "server: score is a str"),
    (True, None, "server: score is a bool"),
    ([1.0], None, "server: score is a list"),
    ({"score": 1.0}, None, "server: score is a dict"),
    (None, None, "server: invalid"),
    (float("inf"), None, "server: score is not finite"),
    (float("-inf"), None, "server: score is not finite"),
    (float("nan"), None, "server: score is not finite"),
    (10**400, None, "server: score is not finite"),
]


@pytest.mark.parametrize(("given", "score", "reason"), SCORES, ids=[str(s[0])[:8] for s in SCORES])
def test_only_finite_numbers_of_a_server_are_scores(given: object, score: object, reason: str):
    with serving(lambda body: iter([whole({"scores": [given, 1.5]})])) as http:
        reward = build_reward({"kind": "remote", "url": http.url})
        assert reward(prompts=["a"] * 2, completions=["b"] * 2) == [score, 1.5]
    assert reward.invalid == ({reason: 1} if reason else {})


REPLIES = {
    "list": whole([1.0, 1.0]),
    "text": whole("0.5"),
    "null": whole(None),
    "scores a dict": whole({"scores": {"a": 1.0, "b": 2.0}}),
    "scores a text": whole({"scores": "ab"}),
    "no scores": whole({"rewards": [1.0, 1.0]}),
    "too few": whole({"scores": [1.0]}),
    "html": whole(b"<html>hello</html>"),
    "empty": whole(b""),
    "deep": whole(b"[" * 200_000),
    "cut": b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"sc',
    "no protocol": b"hello\r\n\r\n",
    "nothing": b"",
    "long line": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES.keys())
def test_a_reply_of_another_form_is_invalid_and_counted(reply: bytes):
    with serving(lambda body: iter([reply])) as http:
        reward = build_reward({"kind": "remote", "url": http.url, "retries": 0, "max_failures": 2})
        assert reward(prompts=["a"] * 2, completions=["b"] * 2) == [None, None]
        assert sum(reward.invalid.values()) == 2
        with pytest.raises(RemoteRewardError, match="2 times in a row"):
            reward(prompts=["a"] * 2, completions=["b"] * 2)


def test_the_deadline_holds_for_a_reply_that_drips():
    for reply in (b'HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"scores"', b"HTTP/1.1 200 OK"):
        parts = [reply, *(b" " for _ in range(2000))]
        with serving(lambda body, parts=parts: iter(parts), pause_s=0.05) as http:
            reward = build_reward({"kind": "remote", "url": http.url})
            reward.deadline_s = 0.5
            began = time.monotonic()
            assert reward(prompts=["a"], completions=["b"]) == [None]
            assert time.monotonic() - began < 60.0
        assert reward.invalid == {"server: TimeoutError": 1}


def test_a_reply_without_end_is_read_to_a_limit(monkeypatch: pytest.MonkeyPatch):
    from reward_models import remote

    monkeypatch.setattr(remote, "MAX_ANSWER_BYTES", 10_000)
    endless = b"HTTP/1.1 200 OK\r\n\r\n"
    with serving(lambda body: (part for part in (endless, *repeat(b" " * 1000, 10**6)))) as http:
        reward = build_reward({"kind": "remote", "url": http.url, "retries": 0})
        assert reward(prompts=["a"], completions=["b"]) == [None]
    assert reward.invalid == {"server: ValueError": 1}


def test_redirects_are_refused():
    moved = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
    with serving(lambda body: iter([moved])) as http:
        reward = build_reward({"kind": "remote", "url": http.url})
        with pytest.raises(RemoteRewardError, match="redirects are not followed"):
            reward(prompts=["a"], completions=["b"])
        assert http.paths == ["/health", "/score"]


def test_the_server_gets_the_columns_of_the_rows():
    with serving(lambda body: iter([whole({"scores": [0.0] * len(body["prompts"])})])) as http:
        reward = build_reward({"kind": "remote", "url": http.url})
        reward(prompts=["a"] * 2, completions=["b"] * 2, answer=["4", float("nan")], prompt_ids=[])
    assert http.seen[0]["columns"] == {"answer": ["4", None]}


def test_a_signal_to_the_command_ends_the_server(artifact: Path):
    port = free_port()
    argv = [sys.executable, "-m", "align.cli", "serve-reward", str(artifact), "--port", str(port)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 300.0
    while True:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None
        assert time.monotonic() < end, "the server did not start"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", port)) != 0


def test_no_server_is_an_error_before_training():
    began = time.monotonic()
    spec = {"kind": "remote", "url": f"http://127.0.0.1:{free_port()}", "deadline_s": 0.5}
    with pytest.raises(RemoteRewardError, match="align serve-reward"):
        build_reward(spec)
    assert time.monotonic() - began < 60.0


def test_a_server_that_fails_is_retried_then_invalid_then_ends_the_stage():
    asked: list[str] = []

    class Flaky(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"status": "ok"})

        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            # The second try succeeds, all later ones fail.
            if len(asked) == 2:
                self.answer(200, {"scores": [0.5]})
            else:
                self.answer(503, {"error": "busy"})

        def answer(self, code: int, body: dict) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Flaky) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_address[1]}"
        reward = build_reward({"kind": "remote", "url": url, "retries": 1, "max_failures": 2})
        assert reward(prompts=["a"], completions=["b"]) == [0.5]
        assert reward(prompts=["a"], completions=["b"]) == [None]
        assert reward.invalid == {"server: HTTPError": 1}
        with pytest.raises(RemoteRewardError, match="2 times in a row"):
            reward(prompts=["a"], completions=["b"])
        http.shutdown()
    assert len(asked) == 6
