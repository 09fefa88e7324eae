"""Data at URLs: downloaded once, newest version, whole or not at all, and then as local files."""

import gzip
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from align.cli import cli
from align.core.errors import DataError
from align.data.load import fingerprints, load_examples
from align.data.reading import read_log, remote
from align.data.reading.provenance import named_files
from align.data.reading.sources import find_files, own_splits, read_rows
from align.recipe.schema import DataSpec


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(remote.PLACE, str(tmp_path / "copies"))
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    remote._found.clear()
    read_log.expect(None)
    yield tmp_path / "copies"
    remote._found.clear()
    read_log.expect(None)


def lines(*names: str) -> bytes:
    return "".join(
        json.dumps({"prompt": name, "completion": "yes"}) + "\n" for name in names
    ).encode()


class Server:
    """A web server; ``files`` maps a path to a body and a tag, ``sent`` lists the bodies sent."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, str | None]] = {}
        self.sent: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                body, tag = server.files.get(self.path, (None, None))
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                if tag:
                    self.send_header("ETag", tag)
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                if self.path in server.files:
                    server.sent.append(self.path)
                    self.wfile.write(server.files[self.path][0])

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


def prompts(path: str) -> list[str]:
    return [row["prompt"] for row, _ in read_rows(path) if isinstance(row, dict)]


def anew() -> None:
    """Do as a new process does."""
    remote._found.clear()
    read_log.expect(None)


def test_a_file_is_downloaded_once_and_again_when_it_changes(server: Server, copies: Path) -> None:
    server.files["/a/rows.jsonl"] = lines("one", "two"), '"1"'
    url = server.url("/a/rows.jsonl")
    copy = copies / "http" / server.host / "a" / "rows.jsonl"
    assert [source for _, source in read_rows(url)] == [f"{copy}:1", f"{copy}:2"]
    for _ in range(2):
        assert prompts(url) == ["one", "two"]
        anew()
    assert server.sent == ["/a/rows.jsonl"]
    server.files["/a/rows.jsonl"] = lines("six", "two"), '"2"'
    assert prompts(url) == ["six", "two"]
    assert len(server.sent) == 2
    # Within a process, all readers see one version.
    server.files["/a/rows.jsonl"] = lines("ten"), '"3"'
    assert prompts(url) == ["six", "two"]
    hidden = [path for path in copy.parent.iterdir() if path.name.startswith(".")]
    assert not [path for path in hidden if ".part" in path.name]


def test_what_reads_a_copy_is_what_reads_a_file(server: Server, tmp_path: Path) -> None:
    body = lines(*(f"question {i}" for i in range(40)))
    server.files["/rows.jsonl.gz"] = gzip.compress(body), '"1"'
    (tmp_path / "rows.jsonl").write_bytes(body)
    url = server.url("/rows.jsonl.gz")
    there, here = (
        [DataSpec(path=path, split="train", heldout_frac=0.5, rows=9)]
        for path in (url, "rows.jsonl")
    )
    found, expected = (load_examples(specs, kind="sft", seed=0) for specs in (there, here))
    assert [e.prompt for e in found] == [e.prompt for e in expected]
    assert len(found) == 9
    (copy,) = find_files(url)
    assert fingerprints(there)[0] == {
        "path": str(copy),
        "sha256": fingerprints([DataSpec(path=str(copy))])[0]["sha256"],
        "rows": 40,
    }
    assert named_files(there[0], {}) == {str(copy): copy}


def test_other_queries_are_other_files(server: Server) -> None:
    for part in "ab":
        server.files[f"/rows.jsonl?part={part}"] = lines(part), None
    for part in "ab":
        assert prompts(server.url(f"/rows.jsonl?part={part}")) == [part]


def test_a_server_without_versions_is_named(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.files["/rows.jsonl"] = lines("one"), None
    assert prompts(server.url("/rows.jsonl")) == ["one"]
    assert "tells no version, so a change that keeps its size is not noticed" in caplog.text
    server.files["/rows.jsonl"] = lines("eleven"), None
    anew()
    assert prompts(server.url("/rows.jsonl")) == ["eleven"]


def test_a_copy_serves_while_the_server_is_away(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.files["/rows.jsonl"] = lines("one"), '"1"'
    url = server.url("/rows.jsonl")
    assert prompts(url) == ["one"]
    del server.files["/rows.jsonl"]
    anew()
    assert prompts(url) == ["one"]
    assert f"{url}: cannot be reached; its copy" in caplog.text
    remote.clean()
    anew()
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: FileNotFoundError"):
        prompts(url)


def test_processes_that_start_together_download_once(server: Server) -> None:
    server.files["/rows.jsonl"] = lines("one"), '"1"'
    url = server.url("/rows.jsonl")
    wanted = {"wanted": lambda path: True}
    start = threading.Barrier(4)

    def copied(_: int) -> str:
        start.wait()
        return remote.local_copy(url, **wanted)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(copied, range(4)))) == 1
    assert server.sent == ["/rows.jsonl"]


@pytest.fixture
def bucket() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_folders_and_patterns_have_their_files_splits_and_removals(bucket: Any) -> None:
    for name in ("train-0", "train-1", "test-0"):
        bucket.pipe(f"/box/set/data/{name}.jsonl", lines(name))
    bucket.pipe("/box/set/README.md", b"text")
    bucket.pipe("/box/set/.hidden.jsonl", lines("hidden"))
    url = "memory://box/set"
    assert sorted(own_splits(url)) == ["test", "train"]
    assert prompts(f"{url}:train") == ["train-0", "train-1"]
    assert prompts("memory://box/set/data/*-0.jsonl") == ["test-0", "train-0"]
    (held,) = load_examples([DataSpec(path=url, split="test")], kind="sft", seed=0)
    assert held.prompt == "test-0"
    copied = {path.name for path in remote.downloads().rglob("*.*") if path.is_file()}
    assert {"README.md", ".hidden.jsonl"}.isdisjoint(copied)
    # What is no longer there is read no more, neither from a folder nor by a pattern.
    pattern = "memory://box/*/data/train-*.jsonl"
    assert prompts(pattern) == ["train-0", "train-1"]
    bucket.rm("/box/set/data/train-1.jsonl")
    anew()
    assert prompts(pattern) == ["train-0"]
    bucket.pipe("/box/set/data/train-1.jsonl", lines("train-1"))
    anew()
    assert prompts(f"{url}:train") == ["train-0", "train-1"]
    bucket.rm("/box/set/data/train-1.jsonl")
    anew()
    assert prompts(f"{url}:train") == ["train-0"]
    with pytest.raises(DataError, match="which are never joined"):
        prompts(url)
    with pytest.raises(DataError, match="'revision' is for hub ids"):
        load_examples([DataSpec(path=url, revision="main", split="test")], kind="sft", seed=0)


def test_a_download_that_breaks_off_leaves_nothing(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/box/rows.jsonl", lines("one"))
    assert prompts("memory://box/rows.jsonl") == ["one"]
    bucket.pipe("/box/rows.jsonl", lines("other", "rows"))
    anew()

    def half(_: Any, path: str, **__: Any) -> None:
        Path(path).write_bytes(lines("other"))

    with monkeypatch.context() as patched:
        patched.setattr(type(bucket), "get_file", lambda self, *a, **k: half(*a, **k))
        with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: \d+ of \d+ bytes came"):
            prompts("memory://box/rows.jsonl")
        patched.setattr(type(bucket), "get_file", lambda *_, **__: 1 / 0)
        with pytest.raises(DataError, match="ZeroDivisionError"):
            prompts("memory://box/rows.jsonl")
    left = [path for path in remote.downloads().rglob("*") if ".part" in path.name]
    assert not left
    assert prompts("memory://box/rows.jsonl") == ["other", "rows"]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("foo://a/rows.jsonl", r"foo:// cannot be read here: ValueError: Protocol not known"),
        ("file:///a/rows.jsonl", r"a file of this machine"),
        ("simplecache::memory://a/rows.jsonl", r"a chain of file systems"),
        ("memory://a/../b/rows.jsonl", r"'\.\.' in it"),
        ("memory://a/none.jsonl", r"cannot be read: FileNotFoundError"),
        ("memory://a/*.jsonl", r"no data file is there"),
        ("memory://box/page", r"unknown file type; expected the address of a data file"),
    ],
)
def test_errors_name_the_url(url: str, told: str, bucket: Any) -> None:
    bucket.pipe("/box/page", b"<html>")
    with pytest.raises(DataError, match=told) as found:
        list(read_rows(url))
    assert found.value.code == "D015"
    assert str(found.value).startswith(url)


def test_a_package_that_is_missing_is_named_before_a_run(
    monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    def missing(url: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    url = server.url("/rows.jsonl")
    command = ["check", "quickstart", "--set", f"stages.sft.data=[{{path: '{url}'}}]"]
    seen = CliRunner().invoke(cli, command)
    assert f"data at {url}" in " ".join(seen.output.split())
    assert not server.sent
    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    told = CliRunner().invoke(cli, command)
    assert "Install s3fs to access S3" in f"{told.output} {told.exception}"


def test_copies_are_listed_and_removed(server: Server) -> None:
    server.files["/rows.jsonl"] = lines("one") * 2**15, '"1"'
    prompts(server.url("/rows.jsonl"))
    listed = CliRunner().invoke(cli, ["cache"]).output
    assert f"copies of data at URLs, {remote.size() / 2**20:,.1f} MiB" in listed
    assert remote.size() > 2**20
    CliRunner().invoke(cli, ["cache", "--clean"])
    assert remote.size() == 0
