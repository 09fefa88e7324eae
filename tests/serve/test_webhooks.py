"""Webhooks: signed as the official client checks it, repeated until they arrive, never inward."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from align.serve.finetuning import webhooks
from tests.serve.killed_server import FAKE
from tests.serve.running import WAIT_S, running
from tests.serve.tiny_model import SUPERVISED, jsonl


class Listener:
    """A server that records what is posted, and answers with the given statuses in turn.

    It answers once its gate is open.
    """

    def __init__(self, *statuses: int, closed: bool = False) -> None:
        self.gate = threading.Event()
        if not closed:
            self.gate.set()
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.arrived = threading.Semaphore(0)
        left = list(statuses)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N805
                body = handler.rfile.read(int(handler.headers["content-length"]))
                self.requests.append((handler.path, dict(handler.headers), body))
                self.gate.wait(WAIT_S)
                handler.send_response(left.pop(0) if left else 200)
                handler.send_header("location", "/elsewhere")
                handler.end_headers()
                self.arrived.release()

            def log_message(self, *_: Any) -> None:
                return

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=WAIT_S)


@contextmanager
def listening(*statuses: int, closed: bool = False) -> Iterator[Listener]:
    listener = Listener(*statuses, closed=closed)
    thread = threading.Thread(target=listener.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield listener
    finally:
        listener.gate.set()
        listener.http.shutdown()
        listener.http.server_close()


def hook(client: OpenAI, url: str, **more: Any) -> Any:
    return client.post("/webhooks", body={"url": url, **more}, cast_to=object)


def test_the_end_of_a_job_is_told_signed_and_again_until_it_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(webhooks, "WAITS_S", (0.05,) * 5)
    settings: dict[str, Any] = {"models": {"tiny": "hub/t"}, "command": (FAKE,)}
    with (
        listening(500, 302) as listener,
        running(tmp_path, private_webhooks=True, **settings) as own,
    ):
        client = own.openai()
        secret = hook(client, f"{listener.url}/hook?a=1")["secret"]
        other = hook(client, f"{listener.url}/never", events=["fine_tuning.job.cancelled"])
        listed: Any = client.get("/webhooks", cast_to=object)
        assert len(listed["data"]) == 2
        assert "secret" not in listed["data"][0]
        file = client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file, seed=2)
        # A 500, a redirect that is not followed, and then a 200.
        listener.wait(3)
        assert {path for path, _, _ in listener.requests} == {"/hook?a=1"}
        events = [
            client.webhooks.unwrap(body, headers, secret=secret)
            for _, headers, body in listener.requests
        ]
        assert {event.id for event in events} == {events[0].id}
        assert events[0].type == "fine_tuning.job.succeeded"
        assert events[0].data.id == job.id
        _, headers, body = listener.requests[0]
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body + b" ", headers, secret=secret)
        while _waiting(own):
            time.sleep(0.02)
        assert len(listener.requests) == 3
        deleted: Any = client.delete(f"/webhooks/{other['id']}", cast_to=object)
        assert deleted["deleted"]


def test_a_receiver_that_does_not_answer_delays_only_its_own_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 10 * WAIT_S)
    settings: dict[str, Any] = {"models": {"tiny": "hub/t"}, "devices": ()}
    with (
        listening(closed=True) as slow,
        listening() as quick,
        running(tmp_path, private_webhooks=True, **settings) as own,
    ):
        client = own.openai()
        for listener in (slow, quick):  # so each event is due at the slow one first
            hook(client, f"{listener.url}/hook")
        file = client.files.create(file=("t.jsonl", jsonl(SUPERVISED)), purpose="fine-tune").id
        for _ in range(3):
            job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
            client.fine_tuning.jobs.cancel(job.id)
            quick.wait(1)
        assert len(slow.requests) == 1
        slow.gate.set()
        slow.wait(3)
        while _waiting(own):
            time.sleep(0.02)
        assert len({body for _, _, body in slow.requests}) == len(slow.requests) == 3


def test_an_answer_that_trickles_in_ends_with_the_time_for_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.5)

    def trickle() -> None:
        peer, _ = listener.accept()
        with peer, suppress(OSError):
            for byte in b"HTTP/1.1 200 " + b"." * 50 + b"\r\n\r\n":
                peer.sendall(bytes([byte]))
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle)
        thread.start()
        with pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"):
            webhooks.send(f"http://127.0.0.1:{listener.getsockname()[1]}/", "{}", {}, private=True)
        thread.join()


def _waiting(own: Any) -> int:
    with own.services.store.read() as db:
        return db.execute("SELECT count(*) FROM deliveries WHERE done = 0").fetchone()[0]


INWARD = (
    "https://127.0.0.1/",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0/",
    "https://0.0.0.0:7860/v1/files",
    "https://localhost/",
    "https://LOCALHOST./",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:10.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://[fe80::1]/",
    "https://[fd00::1]/",
    "https://10.0.0.1/",
    "https://172.16.0.1/",
    "https://192.168.0.1/",
    "https://100.64.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "http://example.com/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:25/",
    "https://user:secret@example.com/",
    "https:///path",
    "https://example.com:99999/",
    "https://example.com/\r\nHost: x",
    "https://exämple.com/",
    "javascript:alert(1)",
    "",
)


def test_webhooks_to_this_machine_and_its_network_are_refused(tmp_path: Path):
    with running(tmp_path, devices=()) as own:
        client = own.openai()
        for url in INWARD:
            with pytest.raises(openai.BadRequestError) as error:
                hook(client, url)
            assert error.value.param == "url", url


def test_a_name_that_turns_inward_after_the_check_is_not_connected_to(
    monkeypatch: pytest.MonkeyPatch,
):
    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))]

    def connect(*args: Any, **_: Any) -> None:
        raise AssertionError(f"connected to {args}")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    address = "93.184.216.34"
    assert webhooks.public_address("rebind.example", 443, private=False) == address
    address = "127.0.0.1"
    with pytest.raises(webhooks.BlockedAddressError):
        webhooks.send("https://rebind.example/", "{}", {}, private=False)
