"""What the campaign of `make faults` found, each as a small case."""

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import torch

from align.core import checkpoints, distributed
from align.core.errors import RecipeError
from align.core.lock import StageLock
from align.core.log import MetricsLog
from align.core.storage import storage_problem
from align.recipe.load import load_recipe


def test_an_input_output_error_of_the_device_is_one_line(tmp_path: Path) -> None:
    told = storage_problem(OSError(errno.EIO, os.strerror(errno.EIO)), tmp_path) or ""
    assert "input/output error" in told
    assert "\n" not in told


@pytest.mark.parametrize(("free", "told"), [(0, "no inodes left"), (3, "no inodes left")])
def test_inodes_that_the_failed_write_freed_again_count_as_none(
    free: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(f_bavail=2**20, f_frsize=4096, f_files=50, f_favail=free)
    monkeypatch.setattr(os, "statvfs", lambda _path: state)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert told in (storage_problem(error, tmp_path) or "")
    state.f_favail = 10**6
    assert "no space left" in (storage_problem(error, tmp_path) or "")


def test_a_lock_that_cannot_be_removed_does_not_hide_why_the_stage_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = StageLock(tmp_path)

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "unlink", fails)
    lock.release()
    monkeypatch.undo()
    lock.path.unlink()


def test_a_disk_without_room_for_a_folder_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed drops the error of its mkdir; torch then says that a parent does not exist."""
    monkeypatch.setenv("ALIGN_DISK_WAIT_S", "0")
    mkdir, wanted = os.mkdir, tmp_path / "checkpoints" / "step-00000001.tmp" / "policy"

    def full(path: object, *args: object, **options: object) -> None:
        if Path(str(path)) == wanted:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        mkdir(path, *args, **options)

    def save_checkpoint(folder: str, *, tag: str, save_latest: bool) -> None:
        with contextlib.suppress(OSError):
            (Path(folder) / tag).mkdir(exist_ok=True)
        torch.save({}, f"{folder}/{tag}/model.pt")

    writer = SimpleNamespace(save=torch.save)
    engine = SimpleNamespace(checkpoint_engine=writer, save_checkpoint=save_checkpoint)
    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(Exception, match=r"No space left|Parent directory") as raised:
        checkpoints.save_checkpoint(
            tmp_path / "checkpoints", 1, engines={"policy": engine}, state={}, keep=1
        )
    assert "no space left on" in (storage_problem(raised.value, tmp_path) or "")


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY])
def test_a_folder_in_the_place_of_a_file_is_named(number: int, tmp_path: Path) -> None:
    error = OSError(number, os.strerror(number), "run/a/x.tmp", None, "run/a/x")
    told = storage_problem(error, tmp_path) or ""
    assert told.startswith("run/a/x: found a folder in the place of a file")


def test_rounds_that_add_no_row_are_logged_once_after_a_resume(tmp_path: Path) -> None:
    """Their lines have the same step, so that the step does not say which came after."""
    log = MetricsLog(tmp_path, total_steps=9)
    for step in (2, 4, 4):
        log.log(step, {"rows/kept": float(step)}, sample={"prompt": "p", "completion": "c"})
    log.close()
    again = MetricsLog(tmp_path, total_steps=9)
    assert again.rewind(4, lines=2) == {"rows/kept": 4.0}
    for file in ("metrics.jsonl", "samples.jsonl"):
        rows = (tmp_path / file).read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [2, 4]


@pytest.mark.parametrize(
    "reply",
    [
        b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"scores": [1.0]}',
        b"hello\r\nworld\r\n\r\n",
    ],
)
def test_a_reply_that_is_cut_is_no_score_and_its_error_is_one_line(reply: bytes) -> None:
    from reward_models.remote import RemoteReward, RemoteRewardError
    from tests.unit.raw_server import serving

    with serving(lambda _request: iter([reply])) as server:
        ask = RemoteReward(server.url, deadline_s=60.0, retries=0, max_failures=2)
        assert ask(prompts=["p"], completions=["c"]) == [None]
        with pytest.raises(RemoteRewardError) as told:
            ask(prompts=["p"], completions=["c"])
    assert "\n" not in str(told.value)
    assert "\r" not in str(told.value)


@pytest.mark.parametrize("head", ["Content-Length: 500", "Transfer-Encoding: chunked"])
def test_a_judge_whose_reply_breaks_off_is_an_error_of_the_judge(head: str) -> None:
    pytest.importorskip("openai", reason="the judge's client is the package openai")
    from reward_models.judge import Endpoint, JudgeClient, JudgeError
    from tests.unit.raw_server import serving

    reply = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{head}\r\n\r\nzz".encode()
    with serving(lambda _request: iter([reply])) as server:
        client = JudgeClient(Endpoint(f"{server.url}/v1", "m", retries=0))
        with pytest.raises(JudgeError, match="no answer after 1 tries"):
            client.ask([[{"role": "user", "content": "?"}]], {"type": "object"})


def _in_a_validator() -> None:
    """Receive a signal while pydantic, which is written in Rust, calls back into Python."""
    import pydantic

    def stop(_value: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return None

    validator = pydantic.TypeAdapter(Annotated[int, pydantic.AfterValidator(stop)])
    try:
        validator.validate_python(1)
    except BaseException as error:
        raise ValueError("Error building validator: StoppedNow: 75") from error


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (_in_a_validator, 75),
        (lambda: 1 / 0, 1),
        (lambda: load_recipe("no.yaml"), 2),
    ],
)
def test_a_signal_whose_exception_a_library_replaces_still_ends_with_75(
    body: Callable[[], object], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.stages import base

    def ended(code: int) -> None:
        raise SystemExit(code)

    before = [(s, signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)]
    for name in ("_asked", "_deferred", "_stopping"):
        monkeypatch.setattr(distributed, name, False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stages", "sft", "--recipe", "r.yaml"])
    monkeypatch.setattr(base, "run_stage", lambda *_: body())
    monkeypatch.setattr(distributed, "end_process", ended)
    try:
        with pytest.raises(SystemExit) as found:
            base.main()
    finally:
        for signum, handler in before:
            signal.signal(signum, handler)
    assert found.value.code == expected


GLOO = "[/x/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:4: Connection reset by peer"
NCCL = "NCCL error: remote process exited or there was a network error, NCCL version 2.27"


@pytest.mark.parametrize(
    ("error", "ranks", "expected"),
    [
        (RuntimeError(GLOO), 2, True),
        (RuntimeError(NCCL), 2, True),
        (RuntimeError(GLOO), 1, False),
        (ConnectionResetError(104, "Connection reset by peer"), 2, False),
        (RuntimeError("size mismatch"), 2, False),
    ],
)
def test_a_rank_knows_that_another_one_ended(
    error: Exception, ranks: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    assert distributed.lost_a_rank(error) is expected


@pytest.mark.parametrize("value", ["{}", "{a: 1}"])
@pytest.mark.parametrize("key", ["steps", "batch_size", "checkpoint_every", "micro_tokens"])
def test_a_block_in_the_place_of_a_number_is_an_error_with_its_line(
    key: str, value: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nstages:\n  base: {kind: base, path: m}\n  sft:\n    kind: sft\n    init: base\n"
        f"    data: [{{world: sft}}]\n    {key}: {value}\n"
    )
    with pytest.raises(RecipeError, match=rf"r\.yaml:8:.*stages\.sft\.{key}"):
        load_recipe(path)


FILES = ("manifest.json", "preflight.json", "tokens.json", "metrics.jsonl", "samples.jsonl")
CONTENTS = {
    "null": "null",
    "list": "[]\n",
    "object": "{}\n",
    "text": '"x"\n',
    "list of texts": '["a", "b"]\n',
    "deep": "[" * 100_000,
    "other keys": '{"step": "x", "lines": {"a": 1}, "metrics": [], "seconds": "long"}\n',
}


@pytest.mark.parametrize("file", [*FILES, "../summary.json"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_report_is_built_from_damaged_files_too(file: str, name: str, tmp_path: Path) -> None:
    from align.recipe.load import write_resolved
    from align.report import build_report

    source = tmp_path / "r.yaml"
    source.write_text("name: r\nstages:\n  base: {kind: base, path: m}\n")
    stage = tmp_path / "run" / "base"
    stage.mkdir(parents=True)
    write_resolved(load_recipe(source), stage / "recipe.yaml")
    card = {"stage": "base", "kind": "base", "lines": [], "seconds": 0.1}
    (stage / "preflight.json").write_text(json.dumps(card))
    (stage / "manifest.json").write_text(json.dumps({"kind": "policy", "seconds": 1.0}))
    (stage / file).write_text(CONTENTS[name])
    page = build_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<h1>r</h1>" in page
    assert "The chain" in page or "chain: not shown" in page
