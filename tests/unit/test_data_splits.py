"""Splits that data has of its own are read one at a time and never joined."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.core.errors import DataError
from align.data.load import load_examples
from align.data.reading.sources import find_files, named_source, read_rows
from align.recipe.schema import DataSpec


def rows(split: str, count: int = 30) -> list[dict]:
    return [{"prompt": f"{split} {i}", "completion": "A"} for i in range(count)]


def write(path: Path, split: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(split)))


def prompts(path: Path | str, **options: object) -> set[str]:
    spec = DataSpec(path=str(path), **options)
    return {str(e.prompt).split()[0] for e in load_examples([spec], kind="sft", seed=0)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made = {name: datasets.Dataset.from_list(rows(name)) for name in ("train", "test")}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "dict"))
    made["train"].save_to_disk(str(tmp_path / "one"))
    return tmp_path


def test_saved_dataset_is_read_without_its_index_files(saved: Path) -> None:
    assert [file.suffix for file in find_files(str(saved / "one"))] == [".arrow"]
    assert prompts(saved / "one") == {"train"}
    # One split is divided by the hash of the prompt, as every file is.
    sides = [
        DataSpec(path=str(saved / "one"), split=side, heldout_frac=0.5)
        for side in ("train", "heldout")
    ]
    found = [{e.prompt for e in load_examples([s], kind="sft", seed=0)} for s in sides]
    assert not found[0] & found[1]
    assert len(found[0] | found[1]) == 30


def test_saved_dictionary_needs_a_split_and_gives_that_one(saved: Path) -> None:
    with pytest.raises(DataError, match=r"has the splits train, test, which are never joined"):
        prompts(saved / "dict")
    assert prompts(saved / "dict", split="test") == {"test"}
    assert prompts(saved / "dict", split="train") == {"train"}
    assert prompts(f"{saved / 'dict'}:test") == {"test"}
    spec = DataSpec(path=f"{saved / 'dict'}:train", split="train", heldout_frac=0.5)
    assert 0 < len(load_examples([spec], kind="sft", seed=0)) < 30
    with pytest.raises(
        DataError, match=r"no split 'heldout'; it has train, test; 'path: .*:train'"
    ):
        prompts(saved / "dict", split="heldout")
    with pytest.raises(DataError, match="no split 'tset'; it has train, test"):
        prompts(f"{saved / 'dict'}:tset")


def test_saved_rows_hold_no_fields_that_only_other_rows_have(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": 2}}]
    table = [
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": call}],
                },
            ]
        }
        for call in calls
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    found = load_examples([DataSpec(path=str(tmp_path / "a.parquet"))], kind="sft", seed=0)
    said = [example.completion[1]["tool_calls"][0]["function"] for example in found]
    assert said == calls


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/part-*.jsonl
  - split: test
    path: [main/held.jsonl]
- config_name: socratic
  data_files: socratic/*.jsonl
---
# A data set
"""


def test_repository_is_read_as_its_card_says(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    for name in ("main/part-0", "main/part-1", "main/held", "socratic/all"):
        write(tmp_path / f"{name}.jsonl", name)
    with pytest.raises(DataError, match="has the configurations main, socratic; choose one with"):
        prompts(tmp_path)
    with pytest.raises(DataError, match="has the splits train, test, which are never joined"):
        prompts(tmp_path, config="main")
    assert prompts(tmp_path, config="main", split="train") == {"main/part-0", "main/part-1"}
    assert prompts(tmp_path, config="main", split="test") == {"main/held"}
    assert prompts(tmp_path, config="socratic") == {"socratic/all"}
    assert prompts(f"{tmp_path}#main:test") == {"main/held"}
    with pytest.raises(DataError, match=r"no configuration 'mian'; it has .* did you mean 'main'"):
        prompts(tmp_path, config="mian")


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("data/train-00000-of-00002.jsonl", "data/validation-00000-of-00001.jsonl"),
        ("gsm8k_train.jsonl", "gsm8k_dev.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("pairs.jsonl", "test.jsonl"),
    ],
)
def test_files_named_after_splits_are_never_joined(tmp_path: Path, names: tuple) -> None:
    for name in names:
        write(tmp_path / name, name)
    with pytest.raises(DataError, match="which are never joined"):
        prompts(tmp_path)


def test_files_of_one_split_or_none_are_one_source(tmp_path: Path) -> None:
    for name in ("train-0", "train-1"):
        write(tmp_path / "a" / f"{name}.jsonl", name)
    assert prompts(tmp_path / "a") == {"train-0", "train-1"}
    for name in ("contest", "latest"):
        write(tmp_path / "b" / f"{name}.jsonl", name)
    assert prompts(tmp_path / "b") == {"contest", "latest"}
    # The index of LLaMA-Factory's data folder is no data.
    (tmp_path / "b" / "dataset_info.json").write_text('{"identity": {"file_name": "x.json"}}')
    assert prompts(tmp_path / "b") == {"contest", "latest"}
    with pytest.raises(
        DataError, match="no splits of its own; expected one of all, train, heldout"
    ):
        prompts(tmp_path / "b", split="tset")


NESTED = "[" * 100_000
DICTS = {
    "list": "[]",
    "null": "null",
    "no key": "{}",
    "numbers": '{"splits": [1, null]}',
    "outside": '{"splits": ["../other"]}',
    "nested": NESTED,
    "no text": b"\xff",
}
STATES = {
    "list": "[]",
    "no key": "{}",
    "text": '{"_data_files": "x"}',
    "number": '{"_data_files": [1]}',
    "no name": '{"_data_files": [{}]}',
    "null": '{"_data_files": [{"filename": null}]}',
    "nul": '{"_data_files": [{"filename": "a\\u0000b"}]}',
    "outside": '{"_data_files": [{"filename": "../secret.jsonl"}]}',
    "absolute": '{"_data_files": [{"filename": "/etc/passwd"}]}',
    "nested": NESTED,
}
CARDS = {
    "outside": "../secret.jsonl",
    "hidden": "a/../../*.jsonl",
    "absolute": "/etc/*.conf",
    "number": "[1]",
    "no pattern": "['']",
    "null": "[null]",
    "no path": "[{split: train}]",
    "stars": "a**b",
    "mapping": "{train: ../secret.jsonl}",
}
"""Ways to damage an index, or to name files that are none of the data set's."""


def in_folder(folder: Path, name: str, content: str | bytes) -> str:
    """Write an index beside a good file; return the message that refuses the folder."""
    write(folder / "x.jsonl", "train")
    write(folder.parent / "secret.jsonl", "secret")
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    with pytest.raises(DataError) as told:
        prompts(folder)
    assert str(folder / name) in str(told.value)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("damage", DICTS)
def test_a_damaged_list_of_splits_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    told = in_folder(tmp_path / "d", "dataset_dict.json", DICTS[damage])
    assert ("outside of" in told) == (damage == "outside")


@pytest.mark.parametrize("damage", STATES)
def test_a_damaged_list_of_saved_files_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    write(tmp_path / "d" / "x.jsonl", "train")
    (tmp_path / "d" / "dataset_info.json").write_text("{}")
    told = in_folder(tmp_path / "d", "state.json", STATES[damage])
    assert ("outside of" in told) == (damage in ("outside", "absolute"))


@pytest.mark.parametrize("damage", CARDS)
def test_a_card_names_files_of_its_own_folder_only(damage: str, tmp_path: Path) -> None:
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {CARDS[damage]}\n---\n"
    told = in_folder(tmp_path / "d", "README.md", card)
    outside = damage in ("outside", "hidden", "absolute", "mapping")
    assert ("outside of" in told) == outside


def test_a_card_of_aliases_is_refused_before_they_are_expanded(tmp_path: Path) -> None:
    """Eight levels of ten aliases each stand for 10^9 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for name, inner in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{inner}'] * 10)}]")
    card = "\n".join(["---", *lines, "configs:", "- config_name: *i", "  data_files: x", "---", ""])
    write(tmp_path / "x.jsonl", "train")
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(DataError, match=r"more than 1,000,000 values"):
        prompts(tmp_path)


def test_a_card_may_map_splits_to_patterns_and_hold_bytes_that_are_no_text(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", name)
    card = b"---\nconfigs:\n- config_name: default\n  data_files: {a: test.jsonl, b: train*}\n"
    (tmp_path / "README.md").write_bytes(card + b"---\nby Jos\xe9\n")
    assert prompts(tmp_path, split="a") == {"test"}
    assert prompts(tmp_path, split="b") == {"train"}


def test_hub_id_takes_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(path: str, name: str | None, **options: object) -> list[dict]:
        asked.append((path, name, options))
        return rows("test")

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **k: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    name, side = named_source("owner/set", config="main", revision="v1.0", split="test")
    assert (name, side) == ("owner/set@v1.0#main:test", "all")
    assert len(list(read_rows(name))) == 30
    assert asked == [("owner/set", "main", {"split": "test", "revision": "v1.0"})]
    with pytest.raises(DataError, match="owner/set: has the splits train, test, which are never"):
        list(read_rows("owner/set"))
