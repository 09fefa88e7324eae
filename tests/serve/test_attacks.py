"""Requests that want more than they may; the other areas' attacks are in their own tests."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from align.recipe.load import load_recipe
from align.serve.finetuning.recipes import job_recipe, resolved, write_recipe
from tests.serve.running import Running, running
from tests.serve.tiny_model import GRADER, SUPERVISED, jsonl

SECRET = "the content of a file outside"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    runs = tmp_path_factory.mktemp("server") / "runs"
    runs.mkdir()
    (runs.parent / "outside.jsonl").write_text(SECRET)
    with running(runs, models={"tiny": "hub/tiny"}, devices=(), body_mib=1, file_mib=1) as found:
        yield found


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def unharmed(answer: httpx.Response) -> None:
    """The request was refused as the client's mistake, with an error object."""
    assert 400 <= answer.status_code < 500, (answer.request.url, answer.text)
    assert SECRET not in answer.text
    assert "root:" not in answer.text
    assert "Traceback" not in answer.text
    if answer.request.url.path.startswith("/v1/"):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


IDS = (
    "../../outside",
    "..%2f..%2foutside",
    "....//....//outside",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "file-*",
    "file-%25",
    "' OR '1'='1",
    "'; DROP TABLE files;--",
    '" UNION SELECT hash FROM tokens --',
    "file-\x00",
    "%00",
    "\u202e",
    "x" * 5000,
)
ROUTES = (
    "GET /v1/files/{}",
    "GET /v1/files/{}/content",
    "DELETE /v1/files/{}",
    "GET /v1/fine_tuning/jobs/{}",
    "GET /v1/fine_tuning/jobs/{}/events",
    "POST /v1/fine_tuning/jobs/{}/cancel",
    "POST /v1/fine_tuning/jobs/{}/resume",
    "GET /v1/models/{}",
    "DELETE /v1/models/{}",
    "GET /v1/fine_tuning/checkpoints/{}/permissions",
    "POST /v1/uploads/{}/cancel",
    "DELETE /v1/webhooks/{}",
)


@pytest.mark.parametrize("route", ROUTES)
def test_an_id_is_no_path_and_no_query(http: httpx.Client, route: str):
    method, _, place = route.partition(" ")
    for name in IDS:
        unharmed(http.request(method, place.format(quote(name, safe=""))))
        unharmed(http.request(method, place.format(quote(name, safe="/%"))))


def test_ids_in_queries_and_bodies_are_no_path_and_no_query(http: httpx.Client):
    for name in IDS:
        for path in ("files", "fine_tuning/jobs"):
            unharmed(http.get(f"/v1/{path}", params={"after": name}))
        for body in (
            {"model": "tiny", "training_file": name},
            {"model": name, "training_file": "file-x"},
        ):
            unharmed(http.post("/v1/fine_tuning/jobs", json=body))
        asked = {"model": name, "messages": [{"role": "user", "content": "x"}]}
        unharmed(http.post("/v1/chat/completions", json=asked))
        listed = http.get("/v1/fine_tuning/jobs", params={f"metadata[{name}]": name})
        assert listed.json()["data"] == []


NAMES = (
    "../../evil.jsonl",
    "/tmp/evil.jsonl",
    "..\\..\\evil.jsonl",
    "a\r\nSet-Cookie: x=1",
    "<script>alert(1)</script>",
    "\x1b]0;evil\x07",
    "..",
    "x" * 3000,
)


def test_a_files_name_is_only_shown(server: Running, http: httpx.Client):
    top = server.services.settings.runs.parent
    before = {p for p in top.rglob("*") if p.parent.name != "files"}
    for name in NAMES:
        data = {"purpose": "fine-tune"}
        made = http.post("/v1/files", data=data, files={"file": (name, b"{}")})
        assert made.status_code == 200, made.text
        shown = made.json()["filename"]
        assert "/" not in shown
        assert shown.isprintable()
        content = http.get(f"/v1/files/{made.json()['id']}/content")
        assert content.content == b"{}"
        assert "set-cookie" not in content.headers
        assert content.headers["content-type"] == "application/octet-stream"
    assert {p for p in top.rglob("*") if p.parent.name != "files"} == before
    files = list((server.services.settings.data / "files").iterdir())
    assert all(re.fullmatch(r"file-[0-9a-f]{24}\.jsonl", path.name) for path in files)
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_bodies_without_sense_or_measure_are_the_clients_mistakes(http: httpx.Client):
    form = {"content-type": "multipart/form-data; boundary=x"}
    plain = {"content-type": "application/json"}
    deep = b"[" * 100_000 + b"]" * 100_000
    for path in ("files", "fine_tuning/jobs", "chat/completions", "uploads", "webhooks"):
        for body, headers in (
            (b"", plain),
            (b"{", plain),
            (b"\xff\xfe{}", plain),
            (b"null", plain),
            (b"[]", plain),
            (b'{"model": NaN}', plain),
            (b'{"a": 1e999999}', plain),
            (b'{"seed": ' + b"9" * 5000 + b"}", plain),
            (deep, plain),
            (b'{"x": ' + deep + b"}", plain),
            (b"--x\r\n\r\n", form),
            (b"--y--", form),
            (b"a=b", {"content-type": "application/x-www-form-urlencoded"}),
            (b"x" * (3 * 2**20), plain),
        ):
            answer = http.post(f"/v1/{path}", content=body, headers=headers)
            unharmed(answer)
    large = {"file": ("x", b"x" * (2 * 2**20))}
    assert http.post("/v1/files", data={"purpose": "batch"}, files=large).status_code == 413


def test_a_graders_text_is_no_variable_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SECRET_KEY", SECRET)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    settings = {
        "grader": {**GRADER, "input": "${SECRET_KEY} $${SECRET_KEY} ${NOTHING}"},
        "hyperparameters": resolved("reinforcement", {"n_epochs": 1, "batch_size": 1}, rows=1)
        | {"learning_rate_multiplier": 1.0, "compute_multiplier": 1.0},
    }
    recipe = job_recipe(
        name="ftjob-1",
        base="hub/tiny",
        seed=0,
        method={"type": "reinforcement", "reinforcement": settings},
        files={"training": rows},
        rows=1,
        integrations=[{"wandb": {"project": "${SECRET_KEY}", "tags": ["${HOME}"]}}],
        url="http://127.0.0.1:1/v1",
    )
    write_recipe(recipe, tmp_path / "recipe.yaml")
    loaded = load_recipe(tmp_path / "recipe.yaml")
    args: Any = loaded.stages["train"].rewards[0].args  # type: ignore[attr-defined]
    assert json.loads(args["grader"]) == settings["grader"]
    assert loaded.sinks.project == "${SECRET_KEY}"
    assert SECRET not in loaded.model_dump_json()


def test_the_browsers_cookie_is_no_token_of_the_api(server: Running):
    with server.browser() as browser:
        assert browser.get("/v1/files").status_code == 401


def test_tokens_are_not_guessed_forged_or_found_in_the_database(server: Running):
    auth = server.services.auth
    delegate = auth.delegate(1)
    assert auth.delegate(1) == delegate
    with server.client() as client:

        def status(token: str) -> int:
            header = {"authorization": token.encode()}
            return client.get("/v1/models", headers=header).status_code  # type: ignore[arg-type]

        assert status(f"Bearer {delegate}") == 200
        with server.services.store.read() as db:
            (stored,) = db.execute("SELECT hash FROM tokens WHERE name = 'tester'").fetchone()
        for token in (
            "",
            "Bearer",
            f"Basic {server.token}",
            server.token,
            f"Bearer {server.token}x",
            f"Bearer {server.token[:-1]}",
            f"Bearer {stored}",
            "Bearer ' OR 1=1 --",
            f"Bearer {delegate[:-1]}",
            delegate.replace("sk-delegate-1.", "Bearer sk-delegate-2."),
            "Bearer sk-delegate-1.",
            "Bearer sk-delegate-" + "9" * 400 + ".x",
            "Bearer sk-delegate-é.x",
        ):
            assert status(token) in (401, 429), token


def test_each_of_a_hundred_files_has_its_own_bytes(http: httpx.Client):
    contents = [jsonl([SUPERVISED[i % 12], i]) for i in range(100)]
    ids = [
        http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", c)}).json()["id"]
        for c in contents
    ]
    assert [http.get(f"/v1/files/{i}/content").content for i in ids] == contents
