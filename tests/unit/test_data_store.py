"""Rows from stores are those that are made in memory, and a store is whole or not used at all."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.cli import cli
from align.core.errors import DataError
from align.core.types import Example, PairRow, PromptRow, TokenRow
from align.data.fit import fit_rows
from align.data.load import check_overlap, load_examples
from align.data.reading import read_log
from align.data.reading.sources import data_fingerprint
from align.data.render.chat import ChatFormat
from align.data.render.templates import TEMPLATES
from align.data.store import folder, source
from align.data.store.columns import record, value_of
from align.data.store.rows import StoredExamples, StoredRows
from align.preflight.offline import sides_of
from align.preflight.tokens import prompt_checks, row_checks
from align.recipe.schema import DataSpec
from align.stages.classify import class_row
from align.stages.kto import labeled_row
from align.stages.reward.stage import _labeled_answer, _labeled_steps
from align.training.evidence import row_facts

NUM = 1100  # more than two chunks


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(folder.PLACE, str(tmp_path / "cache"))
    monkeypatch.setenv("ALIGN_CACHE_FROM_MIB", "0")
    read_log.expect(None)
    yield
    read_log.expect(None)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(byte_tokenizer(TEMPLATES["chatml"], eos="<|im_end|>"))


def said(i: int) -> str:
    return f"What is {i} + {i}? café 漢 \u2028 {'word ' * (i % 7)}"


def sft(i: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": said(i)}, {"role": "assistant", "content": f" {2 * i}\n"}]
    if i % 3 == 0:
        turns = [{"role": "system", "content": "Be brief."}, *turns, *turns[:1], turns[1]]
        turns = [*turns[:-1], {"role": "assistant", "content": "Again.", "weight": 0.5 * (i % 2)}]
    more = {"weight": 0.25} if i % 5 == 0 else {}
    return {"messages": turns, **more, "id": i, "note": {"at": [i, None, 0.1 * i]}}


def pair(i: int) -> dict[str, Any]:
    extra = {"margin": i / 7} if i % 2 else {}
    return {"prompt": said(i), "chosen": "yes " * (i % 30 + 1), "rejected": f"no {i}", **extra}


MAKERS = {
    "sft": (sft, lambda chat: chat.sft_row),
    "preference": (pair, lambda chat: chat.pair_row),
    "unpaired": (
        lambda i: {
            "prompt": [{"role": "user", "content": said(i)}],
            "completion": [{"role": "assistant", "content": f"{i}"}],
            "label": i % 4 == 0,
        },
        lambda chat: partial(labeled_row, chat),
    ),
    "prompts": (
        lambda i: {"prompt": [{"role": "user", "content": said(i)}], "answer": 2.5 * i, "of": [i]},
        lambda chat: chat.prompt_row,
    ),
    "steps": (
        lambda i: {
            "prompt": f"{i} {'w' * (i % 40)}",
            "completions": [f"{k} of {i}" for k in range(1 + i % 3)],
            "labels": [k + i % 2 == 0 for k in range(1 + i % 3)],
        },
        lambda chat: partial(_labeled_steps, chat, "\n"),
    ),
    "answers": (
        lambda i: {"prompt": said(i), "completion": f"{i}", "label": i % 3 == 0},
        lambda chat: partial(_labeled_answer, chat),
    ),
    "classes": (
        lambda i: {"text": said(i), "label": f"class {i % 3}", "id": i},
        lambda chat: partial(class_row, chat.tokenizer),
    ),
}

KINDS: dict[str, Any] = {"answers": "unpaired"}
"""The kind of the rows where it is not the name of the maker."""


def write(path: Path, kind: str, num: int = NUM) -> Path:
    make, _ = MAKERS[kind]
    path.write_text("".join(json.dumps(make(i)) + "\n" for i in range(num)), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_rows_of_a_store_are_those_made_in_memory(
    name: Any, chat: ChatFormat, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", name)
    kind, render = KINDS.get(name, name), MAKERS[name][1](chat)
    one = [DataSpec(path=str(path), split="train", heldout_frac=0.2)]
    few = [DataSpec(world="sft" if kind == "sft" else "prompts", rows=30, weight=1.0)]
    mixed = [DataSpec(path=str(path), weight=2.0), *few] if kind in ("sft", "prompts") else one
    for specs in (one, mixed):
        expected = load_examples(specs, kind=kind, seed=3)
        found = source.load_rows(specs, kind=kind, seed=3, render=render, processes=0)
        assert isinstance(found.examples, StoredExamples)
        assert list(found.examples) == expected
        assert found.rows is not None
        rows = [render(example) for example in expected]
        assert list(found.rows) == rows
        assert [type(row) for row in found.rows] == [type(row) for row in rows]
        assert found.rows[3:9] == rows[3:9]
        # Long rows are dropped, and the prompts of pairs cut, as in memory.
        limits = {"max_length": 60, "max_lost_frac": 1.0, "what": "rows"}
        ledgers = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
        kept, lost = fit_rows(rows, **limits, ledger=ledgers[0])
        fitted, places = found.rows.fit(**limits, ledger=ledgers[1])
        assert list(fitted) == kept
        assert len(kept) < len(rows)
        assert len(places) == len(kept) == len(rows) - lost
        assert ledgers[0].read_bytes() == ledgers[1].read_bytes()
        with pytest.raises(DataError, match="longer than max_length 60") as told:
            found.rows.fit(**{**limits, "max_lost_frac": 0.0}, ledger=None)
        with pytest.raises(DataError) as expected_error:
            fit_rows(rows, **{**limits, "max_lost_frac": 0.0})
        assert str(told.value) == str(expected_error.value)
        if kind == "prompts":
            _same_prompt_checks(fitted, kept, chat, tmp_path)
        else:
            _same_checks(fitted, kept, chat, expected, tmp_path)


def _same_checks(
    fitted: StoredRows, kept: list[Any], chat: ChatFormat, examples: list[Example], tmp_path: Path
) -> None:
    """Compare the checks that read columns with those that read rows."""
    eos = chat.tokenizer.eos_token_id
    flat = [side for row in kept for side in sides_of(row)]
    for stops in (eos, 3):
        config = {"eos_token_id": stops, "vocab_size": 200, "max_position_embeddings": 50}
        (tmp_path / "config.json").write_text(json.dumps(config))
        for ours, theirs in zip(
            row_checks(chat, fitted, examples[:8], model_dir=tmp_path),
            row_checks(chat, flat, examples[:8], model_dir=tmp_path),
            strict=True,
        ):
            assert ours[0] == theirs[0]
            assert ours[1]() == theirs[1]()
    if not isinstance(kept[0], PairRow):  # stages wrap pairs
        assert row_facts(fitted) == row_facts(kept)


def _same_prompt_checks(
    fitted: StoredRows, kept: list[PromptRow], chat: ChatFormat, tmp_path: Path
) -> None:
    eos = chat.tokenizer.eos_token_id
    config = {"eos_token_id": eos, "vocab_size": 200, "max_position_embeddings": 50}
    (tmp_path / "config.json").write_text(json.dumps(config))
    both = [prompt_checks(chat, rows, model_dir=tmp_path) for rows in (fitted, kept)]
    for ours, theirs in zip(*both, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1]() == theirs[1]()


@pytest.mark.parametrize("every", [1, 3])
def test_prompts_of_a_store_have_the_same_columns(
    every: int, chat: ChatFormat, tmp_path: Path
) -> None:
    """A reward sees the columns that any prompt has, whether the file's rows agree or not."""
    rows = [
        {"prompt": f"question {i}", "level": i, **({"answer": str(i)} if i % every == 0 else {})}
        for i in range(20)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = source.load_rows(
        [DataSpec(path=str(path))], kind="prompts", seed=0, render=chat.prompt_row, processes=0
    )
    assert found.rows is not None
    expected = [{"level": i, "answer": str(i) if i % every == 0 else None} for i in range(20)]
    assert [dict(row.columns) for row in found.rows.with_same_columns()] == expected
    assert found.rows.parts[0].fields == (["answer", "level"] if every == 1 else None)


def test_the_number_of_processes_changes_no_byte(chat: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "sft")
    contents = []
    for processes in (0, 2):
        os.environ[folder.PLACE] = str(tmp_path / f"cache{processes}")
        source.load_rows(
            [DataSpec(path=str(path))], kind="sft", seed=0, render=chat.sft_row, processes=processes
        )
        (store, _, _) = folder.stores()[0]
        contents.append({file.name: file.read_bytes() for file in store.iterdir()})
    assert contents[0] == contents[1]


def load(path: Path, chat: ChatFormat, **options: Any) -> source.Loaded:
    spec = DataSpec(path=str(path), **options)
    return source.load_rows([spec], kind="sft", seed=0, render=chat.sft_row, processes=0)


def test_a_second_start_reads_no_row_and_says_the_same(
    chat: ChatFormat,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="align.data")
    path = write(tmp_path / "a.jsonl", "sft", 40)
    with path.open("a") as f:
        f.write(
            '{"messages": [{"role": "user", "content": "zero"}, '
            '{"role": "assistant", "content": "no"}], "weight": 0}\n'
        )
    rows, lines, prints = [], [], []
    for again in (False, True):
        if again:
            monkeypatch.setattr(source, "read_examples", None)
        read_log.expect(None)
        caplog.clear()
        rows.append(list(load(path, chat).rows or ()))
        told = [record.getMessage() for record in caplog.records]
        lines.append([line for line in told if "tokenizing" not in line])
        prints.append(data_fingerprint(str(path)))
    assert rows[0] == rows[1]
    assert lines[0] == lines[1]
    assert any("1 of 41 rows contain no sft example" in line for line in lines[1])
    assert prints[0] == prints[1]
    assert prints[1][0]["rows"] == 41


def test_a_key_covers_what_rows_depend_on(chat: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "sft", 20)
    load(path, chat)
    load(path, chat, weight=3.0)
    assert len(folder.stores()) == 1
    load(path, chat, rename={"note": "other"})
    load(path, chat, split="train")
    assert len(folder.stores()) == 3
    other = ChatFormat(byte_tokenizer(TEMPLATES["plain"], eos="<|im_end|>"))
    assert load(path, other).rows is not None
    assert len(folder.stores()) == 4
    write(path, "sft", 21)
    assert len(load(path, chat).examples) == 21
    assert len(folder.stores()) == 5
    assert source.load_rows([], kind="sft", seed=0, render=chat.sft_row).rows is None


def test_errors_are_those_of_reading_in_memory(chat: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "sft", 30)
    lines = path.read_text().splitlines()
    wrong = '{"messages": [{"role": "user", "content": "a"}]}'
    stop = json.dumps(
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "x<|im_end|>y"},
            ]
        }
    )
    for bad in ([wrong], [stop], [stop, *lines * 40, wrong], [stop, *lines * 40, stop]):
        path.write_text("\n".join([*lines, *bad, *lines]) + "\n")
        with pytest.raises(DataError) as expected:
            list(map(chat.sft_row, load_examples([DataSpec(path=str(path))], kind="sft", seed=0)))
        with pytest.raises(DataError) as found:
            load(path, chat)
        assert str(found.value) == str(expected.value)
        assert not folder.stores()
    assert not list(folder.cache_folder().glob(".building-*"))


def test_prompts_on_both_sides_are_found_as_in_memory(chat: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "sft", 600)
    held = write(tmp_path / "b.jsonl", "sft", 3)
    training, heldout = load(path, chat), load(held, chat)
    shared = list(training.sharing_prompts(heldout.examples))
    assert [example.source for example in shared] == [f"{path}:{i + 1}" for i in range(3)]
    with pytest.raises(DataError) as found:
        check_overlap(training.sharing_prompts(heldout.examples), heldout.examples)
    with pytest.raises(DataError) as expected:
        check_overlap(list(training.examples), list(heldout.examples))
    assert str(found.value) == str(expected.value)
    assert list(training.sharing_prompts([])) == []


@pytest.mark.parametrize("name", ["ids", "trained", "shells", "examples", "meta.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_a_damaged_store_is_made_again(
    name: str, how: str, chat: ChatFormat, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", "sft", 20)
    expected = list(load(path, chat).rows or ())
    (store, _, _) = folder.stores()[0]
    data = (store / name).read_bytes()
    changed = data[:-1] + bytes([data[-1] ^ 1])
    (store / name).write_bytes({"cut": data[:-3], "changed": changed, "missing": b""}[how])
    if how == "missing":
        (store / name).unlink()
    assert list(load(path, chat).rows or ()) == expected


def test_rows_that_are_in_use_stay_readable_when_their_store_is_removed(
    chat: ChatFormat, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", "sft", 20)
    loaded = load(path, chat)
    expected = list(loaded.rows or ())
    assert folder.clean() > 0
    assert not folder.stores()
    assert list(loaded.rows or ()) == expected


class _Hostile:
    def __reduce__(self) -> Any:
        return (os.system, ("false",))


@pytest.mark.parametrize("value", [_Hostile(), os.getcwd, DataError, source.load_rows, ChatFormat])
def test_a_record_builds_data_only(value: object) -> None:
    row = TokenRow((1, 2), (False, True), "a:1", weights=(0.0, 0.5))
    assert value_of(record(row)) == row
    with pytest.raises(DataError, match=r"is not data.*align cache --clean"):
        value_of(record(value))
    with pytest.raises(DataError, match="align cache --clean"):
        value_of(record(row)[:-4])


def _write(place: Path, text: str) -> dict[str, Any]:
    (place / "data").write_text(text)
    return {"text": text}


def test_one_of_many_builds_while_the_others_wait() -> None:
    built: list[Path] = []
    begun, go = threading.Event(), threading.Event()
    found: list[Any] = []

    def build(place: Path) -> dict[str, Any]:
        built.append(place)
        begun.set()
        assert go.wait(120)
        return _write(place, "one")

    threads = [
        threading.Thread(target=lambda: found.append(folder.open_or_build("k" * 32, build)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(120)
    go.set()
    for thread in threads:
        thread.join(timeout=120)
    assert len(built) == 1
    assert [meta for _, meta in found] == [{"text": "one"}] * 3


def test_what_a_killed_process_leaves_is_not_used() -> None:
    key = "ab" * 16
    program = f"""
import sys, time
from align.data.store.folder import open_or_build
def build(place):
    (place / "data").write_text("half")
    print("begun", flush=True)
    time.sleep(600)
open_or_build({key!r}, build)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    assert folder.stores() == []
    folder.clean()  # what is being built stays
    assert list(folder.cache_folder().glob(".building-*"))
    process.kill()
    process.wait(timeout=120)
    # Its lock is free at once, and its half store is removed.
    place, meta = folder.open_or_build(key, partial(_write, text="whole"))
    assert meta == {"text": "whole"}
    assert (place / "data").read_text() == "whole"
    assert not list(folder.cache_folder().glob(".building-*"))


def test_a_full_disk_is_one_line_and_leaves_nothing() -> None:
    def build(place: Path) -> dict[str, Any]:
        (place / "data").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place / "data"))

    with pytest.raises(DataError, match=r"no space left on .*align cache --clean.*ALIGN_CACHE"):
        folder.open_or_build("cd" * 16, build)
    assert [path.name for path in folder.cache_folder().iterdir()] == ["locks"]


def test_the_least_recently_used_stores_are_removed_above_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for i, key in enumerate(("aa", "bb", "cc")):
        place, _ = folder.open_or_build(key * 16, partial(_write, text="x" * 2**20))
        os.utime(place / folder.META, (i, i))
    folder.open_or_build("aa" * 16, partial(_write, text="never"))  # used last
    monkeypatch.setenv(folder.LARGEST, str(4.5 / 1024))
    folder.open_or_build("dd" * 16, partial(_write, text="y" * 2**19))
    assert {path.name[:2] for path, _, _ in folder.stores()} == {"aa", "dd"}
    monkeypatch.setenv(folder.LARGEST, "much")
    with pytest.raises(DataError, match="ALIGN_CACHE_GIB: found 'much', expected a number"):
        folder.prune()


def test_the_command_lists_and_removes_stores(chat: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "sft", 20)
    load(path, chat)
    (store, _, size) = folder.stores()[0]
    shown = CliRunner().invoke(cli, ["cache"])
    assert shown.exit_code == 0
    assert f"20 rows of {path}" in shown.output
    assert store.name[:12] in shown.output
    removed = CliRunner().invoke(cli, ["cache", "--clean"])
    assert f"{size / 2**20:,.1f} MiB removed" in removed.output
    assert not folder.stores()
