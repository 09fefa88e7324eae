"""Requests that want more than they may; the other areas' attacks are in their own tests."""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from align.recipe.load import load_recipe
from align.serve.finetuning.recipes import job_recipe, resolved, write_recipe
from align.serve.labels.items import Candidate, add_items
from align.serve.labels.tables import Project, create_project
from align.serve.labels.tasks import Answer, next_task, record_answer
from tests.serve.running import WAIT_S, Running, running
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
        description="${SECRET_KEY}, from ${NOTHING}",
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
    assert loaded.description == "${SECRET_KEY}, from ${NOTHING}"
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


# ---- labels

SCRIPT = "<script>alert(1)</script>"
QUOTE = '" onfocus="alert(1)'
FORMULAS = ("=1+1", "+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "\0=1", "\uff1d1", "\uff201")
CHANGES: dict[str, dict[str, str]] = {
    "": {"name": "taken", "first": "run/stage"},
    "/attacked/items": {"first": "run/stage"},
    "/attacked/instructions": {"instructions": "overwritten"},
    "/attacked/conflicts/1": {"answer": "b"},
    "/attacked/export": {},
    "/attacked/train": {"recipe": "mine.yaml"},
    "/attacked/stop": {"run": "mine-1"},
}
"""Forms of the labels that are valid, and what they send."""
RESULTS = ("conflicts", "training", "labels.csv", "labels.jsonl", "snapshots/1/preference.jsonl")


@pytest.fixture(scope="module")
def attacked(server: Running) -> Project:
    """Return a project whose only item has two labels that differ; its texts are attacks."""
    with server.services.store.write() as db:
        project = create_project(
            db,
            Project("attacked", wanted=2, reasons=(SCRIPT, QUOTE), instructions=SCRIPT + QUOTE),
        )
        turns: Any = [{"role": SCRIPT, "content": SCRIPT + QUOTE}]
        item = Candidate(turns, (SCRIPT, QUOTE), (SCRIPT, QUOTE), source=SCRIPT)
        add_items(db, project, [item], batch=SCRIPT)
        add_items(db, project, [Candidate("q", (QUOTE, "x"))], batch=QUOTE)
        for name, choice in ((SCRIPT, "left"), ("two", "tie")):
            task = next_task(db, project, name)
            assert task is not None
            edit = SCRIPT + QUOTE if choice == "left" else None
            answer = Answer(choice, edit=edit, reasons=(SCRIPT, QUOTE))
            record_answer(db, project, name, task=task.id, answer=answer)
    return project


def state(server: Running) -> list[str]:
    """Return everything that the database knows about labels and jobs."""
    with server.services.store.read() as db:
        query = "SELECT name FROM sqlite_master WHERE name LIKE 'label%' AND type = 'table'"
        tables = [row[0] for row in db.execute(query)] + ["jobs"]
        return [str([tuple(r) for r in db.execute(f"SELECT * FROM {t}")]) for t in tables]


@contextmanager
def annotator(server: Running, name: str) -> Iterator[httpx.Client]:
    """Yield the browser of an annotator who has logged in."""
    token = server.services.auth.new_token(name, "annotator")
    with httpx.Client(base_url=server.url, timeout=WAIT_S) as browser:
        assert browser.post("/login", data={"token": token}).status_code == 200
        yield browser


def test_an_annotators_own_csrf_token_opens_no_form_and_no_result(
    server: Running, attacked: Project
):
    before = state(server)
    with annotator(server, "ann") as browser:
        form = {"csrf": server.csrf(browser)}
        for path, fields in CHANGES.items():
            refused = browser.post(f"/labels{path}", data={**fields, **form})
            assert refused.status_code == 403, path
            assert "may label at /labels" in refused.text
        for path in RESULTS:
            refused = browser.get(f"/labels/{attacked.name}/{path}")
            assert refused.status_code == 403, path
            assert "two" not in refused.text
    assert state(server) == before


def test_a_form_without_the_browsers_own_csrf_token_changes_nothing(
    server: Running, attacked: Project
):
    before = state(server)
    work = {f"/attacked/{name}": {"skip": True} for name in ("next", "tasks/1", "undo")}
    with server.browser() as browser, annotator(server, "bea") as other:
        stolen = server.csrf(other)
        assert stolen != server.csrf(browser)
        for path, fields in {**CHANGES, **work}.items():
            place = f"/labels{path}"
            for csrf in ({}, {"csrf": ""}, {"csrf": stolen}, {"csrf": "é"}):
                assert browser.post(place, data={**fields, **csrf}).status_code == 403, path
            header = {"x-csrf-token": stolen}
            assert browser.post(place, json=fields, headers=header).status_code == 403, path
    assert state(server) == before


def test_the_work_of_another_annotator_is_not_answered_skipped_or_undone(
    server: Running, attacked: Project
):
    with server.services.store.write() as db:
        shown = next_task(db, attacked, "two")
    assert shown is not None
    query = (
        "SELECT t.* FROM label_tasks t JOIN label_annotators a ON a.id = t.annotator_id "
        "WHERE a.name != 'cleo'"
    )
    token = server.services.auth.new_token("cleo", "annotator")
    with server.client(token=token) as client:
        with server.services.store.read() as db:
            kept = [tuple(row) for row in db.execute(query)]
        for body in ({"choice": "left"}, {"skip": True}):
            for task in (1, 2, shown.id):
                refused = client.post(f"/labels/attacked/tasks/{task}", json=body)
                assert refused.status_code == 409
                assert "not yours" in refused.json()["error"]
        assert client.post("/labels/attacked/undo").json()["task"] is None
        with server.services.store.read() as db:
            assert [tuple(row) for row in db.execute(query)] == kept


def test_texts_of_labels_are_no_markup(server: Running, attacked: Project):
    with server.browser() as admin, annotator(server, QUOTE) as browser:
        for client, path in (
            (admin, ""),
            (admin, "/attacked"),
            (admin, "/attacked/conflicts"),
            (admin, "/attacked/training"),
            (admin, "/attacked/instructions"),
            (admin, "/attacked/work"),
            (browser, ""),
            (browser, "/attacked/instructions"),
            (browser, "/attacked/work"),
        ):
            page = client.get(f"/labels{path}")
            assert page.status_code == 200, path
            assert SCRIPT not in page.text, path
            assert QUOTE not in page.text, path
            if path.endswith(("conflicts", "instructions", "work")):
                assert "&lt;script&gt;alert(1)" in page.text, path
        form = {"csrf": server.csrf(admin)}
        for path, fields in (
            ("train", {"recipe": SCRIPT}),
            ("stop", {"run": SCRIPT}),
            ("conflicts/1", {"answer": SCRIPT}),
        ):
            refused = admin.post(f"/labels/attacked/{path}", data={**fields, **form})
            assert refused.status_code == 400, path
            assert SCRIPT not in refused.text, path
            assert "&lt;script&gt;" in refused.text, path


def test_no_cell_of_the_table_of_labels_is_a_formula(server: Running, http: httpx.Client):
    with server.services.store.write() as db:
        made = Project("formulas", reasons=tuple(f for f in FORMULAS if f.isprintable()))
        project = create_project(db, made)
        for evil in FORMULAS:
            item = Candidate(evil, (evil, evil + "b"), (evil, evil), source=evil)
            add_items(db, project, [item], batch=evil)
        while (task := next_task(db, project, "=cmd")) is not None:
            reasons, edit = project.reasons, str(task.responses[0])[:2] + "edited"
            answer = Answer("left", edit=edit, reasons=reasons)
            record_answer(db, project, "=cmd", task=task.id, answer=answer)
    text = http.get("/labels/formulas/labels.csv").content.decode()
    found = list(csv.DictReader(io.StringIO(text, newline="")))
    evil_columns = ("batch", "from", "prompt", "response_a", "response_b", "model_a", "model_b")
    for name in (*evil_columns, "edit", "reasons"):
        assert all(row[name].startswith("'") for row in found), name
    for row in found:
        assert not any(
            cell.startswith(FORMULAS) or cell[:1] in "=+-@" for cell in row.values() if cell
        )
    assert sorted(row["prompt"][1:] for row in found) == sorted(FORMULAS)
    rows = [
        json.loads(line) for line in http.get("/labels/formulas/labels.jsonl").text.split("\n")[:-1]
    ]
    assert sorted(row["prompt"] for row in rows) == sorted(FORMULAS), "programs get the text itself"


def test_names_and_numbers_of_labels_are_no_path_and_no_query(
    server: Running, http: httpx.Client, attacked: Project
):
    for name in IDS:
        for path in ("conflicts", "training", "instructions", "labels.csv", "work"):
            unharmed(http.get(f"/labels/{quote(name, safe='')}/{path}"))
        unharmed(http.get(f"/labels/attacked/snapshots/1/{quote(name, safe='')}"))
        unharmed(http.post("/labels/attacked/train", data={"recipe": name}))
        unharmed(http.post("/labels/attacked/stop", data={"run": name}))
    for number in ("0", "-1", "-" + "9" * 20, "9" * 18, str(2**63), "9" * 400, "1e3", "x"):
        unharmed(http.post(f"/labels/attacked/tasks/{number}", json={"choice": "left"}))
        unharmed(http.post(f"/labels/attacked/conflicts/{number}", data={"answer": "a"}))
        unharmed(http.get(f"/labels/attacked/snapshots/{number}/preference.jsonl"))


# ---- texts that UTF-8 cannot encode

HALF = "\\ud83d"
"""Half of an emoji, as JSON escapes it."""


def test_half_of_an_emoji_is_the_clients_mistake(server: Running, http: httpx.Client):
    with server.services.store.write() as db:
        add_items(db, create_project(db, Project("emoji")), [Candidate("q", ("a", "b"))])
    task = http.post("/labels/emoji/next").json()["task"]["id"]
    for path, body in (
        ("/v1/fine_tuning/jobs", '{"model": "tiny", "training_file": "HALF"}'),
        (
            "/v1/chat/completions",
            '{"model": "HALF", "messages": [{"role": "user", "content": "x"}]}',
        ),
        (f"/labels/emoji/tasks/{task}", '{"choice": "left", "edit": "HALF"}'),
    ):
        plain = {"content-type": "application/json"}
        answer = http.post(path, content=body.replace("HALF", HALF), headers=plain)
        unharmed(answer)
        assert answer.status_code == 400
        assert "surrogate" in str(answer.json()["error"])
