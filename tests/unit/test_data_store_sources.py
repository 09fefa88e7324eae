"""Samples, functions of users, exported labels and hub ids have stores, with the rows of memory."""

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import datasets
import pyarrow
import pyarrow.parquet
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from small_tokenizers import byte_tokenizer

from align.core.errors import DataError
from align.data.labels import write_snapshot
from align.data.load import fingerprints, load_examples
from align.data.reading import read_log
from align.data.render.chat import ChatFormat
from align.data.render.templates import TEMPLATES
from align.data.store import folder, source
from align.data.store.columns import record, value_of
from align.data.store.rows import StoredExamples
from align.recipe.schema import DataSpec

NUM = 600  # more than one chunk


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(folder.PLACE, str(tmp_path / "cache"))
    monkeypatch.setenv("ALIGN_CACHE_FROM_MIB", "0")
    read_log.expect(None)
    yield
    read_log.expect(None)


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat(byte_tokenizer(TEMPLATES["chatml"], eos="<|im_end|>"))


def asked(i: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i}"}]
    return {"messages": turns, "id": i}


def write(path: Path, num: int = NUM) -> DataSpec:
    path.write_text("".join(json.dumps(asked(i)) + "\n" for i in range(num)), encoding="utf-8")
    return DataSpec(path=str(path))


def load(*specs: DataSpec, chat: ChatFormat, kind: Any = "sft", seed: int = 0) -> source.Loaded:
    render = {"sft": chat.sft_row, "preference": chat.pair_row}[kind]
    return source.load_rows(specs, kind=kind, seed=seed, render=render, processes=0)


def same_as_in_memory(*specs: DataSpec, chat: ChatFormat, kind: Any = "sft", seed: int = 0) -> None:
    found = load(*specs, chat=chat, kind=kind, seed=seed)
    prints = fingerprints(specs)
    read_log.expect(None)
    expected = load_examples(specs, kind=kind, seed=seed)
    assert isinstance(found.examples, StoredExamples)
    assert list(found.examples) == expected
    assert found.rows is not None
    render = {"sft": chat.sft_row, "preference": chat.pair_row}[kind]
    assert list(found.rows) == list(map(render, expected))
    assert prints == fingerprints(specs)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_sample_is_the_one_of_memory(seed: int, chat: ChatFormat, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", 50)
    for rows in (1, 250, NUM, 10 * NUM):
        sampled = one.model_copy(update={"rows": rows, "split": "train", "heldout_frac": 0.2})
        same_as_in_memory(sampled, chat=chat, seed=seed)
    # Each of the sources in a mixture has a sample of its own.
    few = [one.model_copy(update={"rows": 40, "weight": 3.0}), two.model_copy(update={"rows": 30})]
    same_as_in_memory(*few, few[0], chat=chat, seed=seed)
    # However many rows are taken, the file is tokenized once; its training side is another store.
    assert len(folder.stores()) == 3


def test_columns_of_tables_keep_their_types(chat: ChatFormat, tmp_path: Path) -> None:
    when = datetime(2026, 11, 27, tzinfo=UTC)
    table = {"prompt": ["a b", "c"], "when": [when, None], "raw": [b"\0x", b""], "x": [0.1, 2.0]}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    specs = [DataSpec(path=str(path))]
    found = source.load_rows(specs, kind="prompts", seed=0, render=chat.prompt_row, processes=0)
    expected = load_examples(specs, kind="prompts", seed=0)
    assert list(found.examples) == expected
    for value in (when, when.astimezone(ZoneInfo("Asia/Tokyo")), b"\0x", Decimal("1.50"), "\ud800"):
        assert value_of(record(value)) == value


CODE = """
from pathlib import Path
import random, re

seeded = random.Random(3)

def made(row):
    return [{"prompt": f"{row['id']} {i}", "completion": f"{LEVEL}"} for i in range(row["id"] % 3)]

def reads(row):
    return {"prompt": f"{row['id']}", "completion": Path("answer.txt").read_text()}

def drawn(row):
    return {"prompt": f"{row['id']}", "completion": f"{random.random()}"}

def counts(row):
    return {"prompt": f"{row['id']}", "completion": f"{seeded.random()}"}
"""


def test_what_a_function_makes_has_a_store(chat: ChatFormat, tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl")
    code = tmp_path / "own.py"
    for level, number in ((1, 1), (2, 2), (1, 2)):
        code.write_text(f"LEVEL = {level}\n{CODE}")
        same_as_in_memory(spec.model_copy(update={"map": f"{code}:made"}), chat=chat)
        assert len(folder.stores()) == number
    # Its own generator begins anew with its process, so it makes the same rows again.
    same_as_in_memory(spec.model_copy(update={"map": f"{code}:counts"}), chat=chat)


def test_a_function_may_read_other_files(chat: ChatFormat, tmp_path: Path) -> None:
    code, answer = tmp_path / "own.py", tmp_path / "answer.txt"
    code.write_text(CODE)
    spec = write(tmp_path / "a.jsonl", 20).model_copy(update={"map": f"{code}:reads"})
    for text in ("first", "second"):
        answer.write_text(text)
        assert {example.completion for example in load(spec, chat=chat).examples} == {text}


def test_a_function_that_makes_other_rows_each_time_is_refused(
    chat: ChatFormat, tmp_path: Path
) -> None:
    code = tmp_path / "own.py"
    code.write_text(CODE)
    spec = write(tmp_path / "a.jsonl", 20).model_copy(update={"map": f"{code}:drawn"})
    with pytest.raises(DataError, match=r"own\.py:drawn: made other rows when it was called again"):
        load(spec, chat=chat)
    assert not folder.stores()


def test_a_second_start_makes_rows_but_tokenizes_none(
    chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "own.py"
    code.write_text(f"LEVEL = 1\n{CODE}")
    spec = write(tmp_path / "a.jsonl", 20).model_copy(update={"map": f"{code}:made"})
    expected = list(load(spec, chat=chat).rows or ())
    monkeypatch.setattr(source, "build_store", None)
    assert list(load(spec, chat=chat).rows or ()) == expected


def test_exported_labels_have_a_store(chat: ChatFormat, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(NUM)]
    write_snapshot("mine", {"preference.jsonl": pairs}, {"votes": 1})
    same_as_in_memory(DataSpec(labels="mine"), chat=chat, kind="preference")
    same_as_in_memory(DataSpec(labels="mine", answers="both", rows=9), chat=chat)
    write_snapshot("mine", {"preference.jsonl": pairs[:5]}, {"votes": 1})
    assert len(load(DataSpec(labels="mine"), chat=chat, kind="preference").examples) == 5
    assert len(load(DataSpec(labels="mine@1"), chat=chat, kind="preference").examples) == NUM
    with pytest.raises(DataError, match="no snapshot in"):
        load(DataSpec(labels="other"), chat=chat, kind="preference")


class Hub:
    """A folder that stands for the data set owner/set of the hub; ``asked`` counts its loads."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.asked = path, 0
        builder, read = datasets.load_dataset_builder, datasets.load_dataset
        path.mkdir()

        def load_dataset(name: str, *_: Any, split: str, **__: Any) -> Any:
            assert name == "owner/set"
            self.asked += 1
            return read(str(path), split=split)

        def splits(name: str, *_: Any, **__: Any) -> list[str]:
            if name != "owner/set":
                raise ConnectionError("no such data set")
            return sorted({file.stem.partition("-")[0] for file in path.iterdir()})

        cache = path.parent / "hub-cache"
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        monkeypatch.setattr(datasets, "get_dataset_split_names", splits)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(
            datasets, "load_dataset_builder", lambda name, *_, **__: builder(str(path))
        )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "set", monkeypatch)


def test_a_hub_id_has_a_store(hub: Hub, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    write(hub.path / "train-0.jsonl")
    write(hub.path / "train-1.jsonl", 30)
    write(hub.path / "test-0.jsonl", 20)
    spec = DataSpec(path="owner/set", split="train")
    same_as_in_memory(spec, chat=chat)
    expected = list(load(spec, chat=chat).rows or ())
    assert len(expected) == NUM + 30
    assert expected[NUM].source == f"owner/set:train:row {NUM + 1}"
    # Another split is another store, as is another version of the data.
    same_as_in_memory(spec.model_copy(update={"split": "test", "rows": 7}), chat=chat)
    assert len(folder.stores()) == 2
    with monkeypatch.context() as patched:
        # A second start opens the data set once and reads no row.
        patched.setattr(source, "read_examples", None)
        read_log.expect(None)
        before = hub.asked
        assert list(load(spec, chat=chat).rows or ()) == expected
        assert hub.asked == before + 1
        prints = fingerprints([spec])
        assert hub.asked == before + 1
    read_log.expect(None)
    assert fingerprints([spec]) == prints
    assert prints[0]["rows"] == NUM + 30
    write(hub.path / "train-1.jsonl", 31)
    assert len(load(spec, chat=chat).examples) == NUM + 31


def test_errors_of_a_hub_id_are_those_of_memory(
    hub: Hub, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(hub.path / "train-0.jsonl", 3)
    write(hub.path / "test-0.jsonl", 3)
    for name, told in (("owner/set", "has the splits test, train"), ("owner/other", "no such")):
        found = []
        for mib in ("0", "32"):
            monkeypatch.setenv("ALIGN_CACHE_FROM_MIB", mib)
            with pytest.raises(DataError, match=told) as error:
                load(DataSpec(path=name), chat=chat)
            found.append(str(error.value))
        assert found[0] == found[1]


def test_a_small_data_set_of_the_hub_is_opened_once(
    hub: Hub, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(hub.path / "train-0.jsonl", 3)
    monkeypatch.setenv("ALIGN_CACHE_FROM_MIB", "32")
    found = load(DataSpec(path="owner/set"), DataSpec(path="owner/set", rows=2), chat=chat)
    assert found.rows is None
    assert len(found.examples) == 5
    assert hub.asked == 1
