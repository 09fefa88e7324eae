"""The server without its areas: database, proofs of who asks, and what every request passes."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from align.core.errors import ArtifactError, RecipeError
from align.serve.guard import is_known_host
from align.serve.store import Store
from tests.serve.running import Running, running

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("runs")) as found:
        yield found


# ---- database


def test_a_write_is_whole_or_nothing(tmp_path: Path):
    store = Store(tmp_path)
    store.migrate("a", ("CREATE TABLE t (x INTEGER); INSERT INTO t VALUES (1);",))
    script = "INSERT INTO t VALUES (?)"
    with pytest.raises(sqlite3.ProgrammingError), store.write() as db:
        db.executemany(script, [(2,), (3, 3)])
    with store.read() as db:
        assert [row["x"] for row in db.execute("SELECT x FROM t")] == [1]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            db.execute("INSERT INTO t VALUES (3)")


def test_migrations_are_applied_once_per_area_and_a_failing_one_leaves_nothing(tmp_path: Path):
    store = Store(tmp_path)
    first = "CREATE TABLE t (x TEXT); CREATE INDEX i ON t (x); INSERT INTO t VALUES ('a;b');"
    store.migrate("a", (first,))
    with pytest.raises(sqlite3.OperationalError):
        store.migrate("a", (first, "CREATE TABLE u (x); CREATE TABLE t (x);"))
    store.migrate("a", (first, "INSERT INTO t VALUES ('c')"))
    store.migrate("a", (first, "INSERT INTO t VALUES ('c')"))
    store.migrate("b", ("CREATE TABLE u (x)",))
    with store.read() as db:
        assert [row[0] for row in db.execute("SELECT x FROM t ORDER BY x")] == ["a;b", "c"]
    with pytest.raises(ArtifactError, match=r"version 2.*newer align-suite"):
        store.migrate("a", (first,))


def test_a_committed_row_survives_kill_9(tmp_path: Path):
    code = (
        "import os, sys, pathlib; from align.serve.store import Store\n"
        "s = Store(pathlib.Path(sys.argv[1])); s.migrate('a', ('CREATE TABLE t (x)',))\n"
        "with s.write() as db: db.execute('INSERT INTO t VALUES (1)')\n"
        "with s.write() as db:\n"
        "    db.execute('INSERT INTO t VALUES (2)'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    with Store(tmp_path).read() as db:
        assert [row[0] for row in db.execute("SELECT x FROM t")] == [1]


def test_writers_of_a_process_wait_for_each_other(tmp_path, monkeypatch):
    # Without a wait of SQLite's own, a second writer would fail at once.
    monkeypatch.setattr("align.serve.store.BUSY_S", 0.0)
    store = Store(tmp_path)
    store.migrate("a", ("CREATE TABLE t (x INTEGER)",))

    def write(i: int) -> None:
        with store.write(durable=i % 2 == 0) as db:
            (level,) = db.execute("PRAGMA synchronous").fetchone()
            assert level == (2 if i % 2 == 0 else 1)
            db.execute("INSERT INTO t SELECT count(*) FROM t")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    with store.read() as db:
        found = [row["x"] for row in db.execute("SELECT x FROM t ORDER BY rowid")]
    assert found == list(range(200))


def test_a_connection_that_read_can_write_and_keeps_nothing_of_a_failed_block(tmp_path):
    store = Store(tmp_path)
    store.migrate("a", ("CREATE TABLE t (x INTEGER)",))
    failing = "INSERT INTO t SELECT 1 UNION SELECT abs(-9223372036854775808)"

    def insert_and_fail() -> None:
        with store.write() as db:
            db.execute("INSERT INTO t VALUES (0)")
            db.execute(failing)

    with pytest.raises(sqlite3.OperationalError, match="overflow"):
        insert_and_fail()
    with pytest.raises(sqlite3.OperationalError, match="readonly"), store.read() as db:
        db.execute("INSERT INTO t VALUES (2)")
    with store.write() as db:
        db.execute("INSERT INTO t VALUES (3)")
    with store.read() as db:
        assert [row["x"] for row in db.execute("SELECT x FROM t")] == [3]


def test_a_write_inside_of_a_write_is_an_error_and_no_endless_wait(tmp_path: Path):
    store = Store(tmp_path)
    store.migrate("a", ("CREATE TABLE t (x INTEGER)",))
    with store.write() as db:
        db.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(RuntimeError, match="inside of"), store.write():
            pass
    with store.write() as db:
        db.execute("INSERT INTO t VALUES (2)")
    with store.read() as db:
        assert [row["x"] for row in db.execute("SELECT x FROM t")] == [1, 2]


# ---- who asks


def test_a_token_is_kept_as_a_hash_only_and_a_name_is_given_once(server: Running):
    token = server.services.auth.new_token("once")
    folder = server.services.settings.data
    assert token.encode() not in b"".join(p.read_bytes() for p in folder.iterdir() if p.is_file())
    for name in ("once", "", " ", "a\nb", "x" * 65):
        with pytest.raises(RecipeError, match="--new-token"):
            server.services.auth.new_token(name)


def test_the_login_address_works_once_and_sets_a_strict_cookie(server: Running):
    code = server.services.auth.login_code()
    with server.client() as client:
        answer = client.get("/login", params={"code": code})
        cookie = answer.headers["set-cookie"]
        assert answer.status_code == 200
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert client.get("/login", params={"code": code}).status_code == 401


def test_a_token_logs_in_and_a_changed_cookie_does_not(server: Running):
    with server.client() as client:
        client.post("/login", data={"token": server.token})
        assert "tester" in client.get("/login").text
        value = client.cookies["align_session"]
        body, _, mac = value.rpartition(".")
        client.cookies.clear()
        forged = ("1" + body + "." + mac, body + ".", "." + mac, "....", body + ".é", "9" * 5000)
        for wrong in forged:
            page = client.get("/login", headers={"cookie": f"align_session={wrong}".encode()})
            assert page.status_code == 200
            assert "tester" not in page.text


def test_a_form_without_its_csrf_token_changes_nothing(server: Running):
    with server.browser() as browser:
        assert browser.post("/logout").status_code == 403
        assert browser.post("/logout", data={"csrf": "0" * 64}).status_code == 403
        with server.browser() as other:
            foreign = server.csrf(other)
        assert browser.post("/logout", data={"csrf": foreign}).status_code == 403
        assert "owner" in browser.get("/login").text
        answer = browser.post("/logout", data={"csrf": server.csrf(browser)})
        assert answer.status_code == 303
        assert "owner" not in browser.get("/login").text


def test_guesses_are_slowed_down_and_the_right_token_is_not(tmp_path: Path):
    with running(tmp_path) as own, own.client() as client:
        found = [client.post("/login", data={"token": f"g{i}"}).status_code for i in range(40)]
        assert found == [401] * 30 + [429] * 10
        assert client.post("/login", data={"token": own.token}).status_code == 200


# ---- every request


def test_hosts_that_another_site_can_point_here_are_refused(server: Running):
    with server.client() as client:
        for host in ("evil.example", "evil.example:7860", "127.0.0.1.nip.io", "", "localhost."):
            assert client.get("/login", headers={"host": host}).status_code == 421, host
        for host in ("localhost:1", "127.0.0.1", "[::1]:7860", "LOCALHOST"):
            assert client.get("/login", headers={"host": host}).status_code == 200, host
    assert is_known_host("align.lab:80", ("Align.Lab",))
    assert not is_known_host("align.lab", ())


def test_every_answer_has_the_headers_that_keep_foreign_content_out(server: Running):
    with server.client() as client:
        for path in ("/login", "/nothing", "/static/serve.css", "/v1/nothing"):
            headers = client.get(path).headers
            policy = dict(
                part.split(" ", 1) for part in headers["content-security-policy"].split("; ")
            )
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == "'self'"
            assert policy["frame-ancestors"] == "'none'"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert headers["x-request-id"].startswith("req_")


def test_a_large_body_is_refused_with_and_without_its_length(tmp_path: Path):
    with running(tmp_path, body_mib=1) as own, own.client() as client:
        large = b"token=" + b"x" * (2 * 2**20)
        form = {"content-type": "application/x-www-form-urlencoded"}
        assert client.post("/login", content=large, headers=form).status_code == 413
        chunks = (large[i : i + 2**16] for i in range(0, len(large), 2**16))
        assert client.post("/login", content=chunks, headers=form).status_code in (400, 413)


def test_errors_are_objects_for_programs_and_pages_for_people(server: Running):
    with server.client() as client:
        error = client.get("/v1/nothing").json()["error"]
        assert error["type"] == "not_found_error"
        assert set(error) == {"message", "type", "param", "code"}
        page = client.get("/nothing/<script>alert(1)</script>")
        assert page.status_code == 404
        assert page.headers["content-type"].startswith("text/html")
        assert "<script>alert" not in page.text


def test_nothing_outside_of_the_static_files_is_served(server: Running):
    with server.client() as client:
        assert client.get("/static/htmx-2.0.11.min.js").status_code == 200
        for path in ("../app.py", "..%2fapp.py", "%2e%2e/%2e%2e/core/log.py", "/etc/passwd"):
            assert client.get(f"/static/{path}").status_code in (404, 405), path


def test_a_second_server_of_the_same_runs_is_refused(server: Running):
    from align.serve.app import only_server

    with (
        pytest.raises(ArtifactError, match="another 'align serve'"),
        only_server(server.services.settings.data),
    ):
        pass


# ---- the command


def align(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "align", "serve", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_revoked_token_is_refused_with_its_sessions_and_its_name_stays_taken(server: Running):
    auth = server.services.auth
    token = auth.new_token("leaves")
    with server.client(token=token) as bearer, httpx.Client(base_url=server.url) as browser:
        assert bearer.get("/v1/models").status_code == 200
        logged_in = browser.post("/login", data={"token": token})
        assert logged_in.is_success or logged_in.is_redirect
        assert browser.get("/").status_code == 200
        auth.revoke_token("leaves")
        assert bearer.get("/v1/models").status_code == 401
        assert browser.get("/").status_code != 200
        assert not browser.post("/login", data={"token": token}).is_success
    # The others stay, and a new person does not get the old one's files.
    assert server.client().get("/v1/models").status_code == 200
    with pytest.raises(RecipeError, match="there is one already"):
        auth.new_token("leaves")
    for name, told in (("leaves", "tester"), ("nobody", "tester"), ("owner", "login codes")):
        with pytest.raises(RecipeError, match=rf"--revoke-token {name}.*{told}"):
            auth.revoke_token(name)


def test_a_new_token_is_printed_once(tmp_path: Path):
    done = align("--new-token", "alice", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sk-align-")
    again = align("--new-token", "alice", cwd=tmp_path)
    assert again.returncode == 2
    assert "there is one already" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_what_keeps_a_server_from_starting_is_one_line(server: Running, tmp_path: Path):
    settings = server.services.settings
    port = str(settings.port)
    for words, message in (
        (("--runs", str(settings.runs.resolve())), "another 'align serve' uses these runs"),
        (("--port", port), f"127.0.0.1 port {port}: Address already in use. Use another --port"),
        (("--host", "192.0.2.1"), "192.0.2.1 port 7860: "),
        (("--model", "tiny=/nothing/here"), "--model tiny=/nothing/here: "),
        (("--model", "=x"), "expected NAME=MODEL"),
    ):
        done = align(*words, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_without_the_extra_the_command_names_it(tmp_path: Path):
    hidden = tmp_path / "sitecustomize.py"
    hidden.write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'fastapi' else find(name, *a)\n"
    )
    done = align("--new-token", "x", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("pip install 'align-suite[serve]'")


def test_without_torch_the_server_says_at_its_start_what_it_cannot_do(
    server: Running, tmp_path: Path
):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
    )
    busy = str(server.services.settings.port)
    done = align("--port", busy, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    warning, error = done.stderr.strip().splitlines()
    assert "the fine-tuning API needs torch, which this installation lacks" in warning
    assert warning.endswith("pip install 'align-suite[serve]'")
    assert "Address already in use" in error


def test_the_command_line_starts_without_the_web_libraries():
    web = "{'fastapi', 'uvicorn', 'starlette'}"
    code = f"import sys, align, align.cli; print(sorted({web} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
