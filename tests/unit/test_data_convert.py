"""align data show and align data convert."""

import json
from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from align.core.errors import DataError
from align.data.convert import convert, convert_sides
from align.data.formats.detect import to_examples
from align.data.load import load_examples
from align.data.reading.sources import read_rows
from align.data.split import hash_fraction
from align.data.token_view import as_html, as_text, views
from align.recipe.schema import DataSpec
from tests.fault_corpus import clean_rows, write_rows
from tests.unit.test_data_chat import make_tokenizer


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "parquet", "csv"])
def test_converted_rows_are_read_back_as_the_same_examples(tmp_path: Path, suffix: str):
    source = tmp_path / "in.jsonl"
    write_rows(clean_rows("sft"), source, "jsonl")
    before = load_examples([DataSpec(path=str(source))], kind="sft", seed=0)
    for to in ("messages", "prompt_completion", "alpaca", "sharegpt"):
        if suffix == "csv" and to in ("messages", "sharegpt"):
            continue  # a table holds no conversations
        out = tmp_path / f"{to}.{suffix}"
        convert([DataSpec(path=str(source))], out, to=to, seed=0, columns=True)
        after = load_examples([DataSpec(path=str(out))], kind="sft", seed=0)
        contents = [[t["content"] for t in e.completion] for e in before]
        assert [
            [t["content"] for part in (e.prompt, e.completion) for t in part]
            if not isinstance(e.prompt, str)
            else [e.prompt, e.completion]
            for e in after
        ] == contents
        assert [e.columns["id"] for e in after] == [e.columns["id"] for e in before]


def test_the_folder_of_the_output_is_made_where_it_can_be(tmp_path: Path):
    source = tmp_path / "in.jsonl"
    write_rows(clean_rows("sft"), source, "jsonl")
    specs = [DataSpec(path=str(source))]
    convert(specs, tmp_path / "a" / "b" / "out.jsonl", to="messages", seed=0, columns=True)
    assert (tmp_path / "a" / "b" / "out.jsonl").is_file()
    with pytest.raises(DataError, match=r"in\.jsonl/out\.jsonl: cannot be written: .* Use another"):
        convert(specs, source / "out.jsonl", to="messages", seed=0, columns=True)


def test_a_table_has_every_column_that_a_row_has(tmp_path: Path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.csv"
    system = {"role": "system", "content": "be kind"}
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": asked}, {"messages": [system, *asked], "id": "x", "weight": 2.0}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert([DataSpec(path=str(source))], out, to="alpaca", seed=0, columns=True)
    lines = out.read_text().splitlines()
    assert lines == ["instruction,input,output,id,weight,system", "q,,a,,,", "q,,a,x,2.0,be kind"]
    first, second = load_examples([DataSpec(path=str(out))], kind="sft", seed=0)
    assert (first.prompt, first.weight) == (asked[:1], 1.0)
    assert (second.prompt, second.weight) == ([system, asked[0]], 2.0)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "tsv"])
def test_numbers_of_pairs_survive_every_file_type(tmp_path: Path, suffix: str):
    source, out = tmp_path / "in.jsonl", tmp_path / f"out.{suffix}"
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    more = [{"margin": 0.5}, {"label_prob": 0.9}, {"score_chosen": 9, "score_rejected": 1.5}, {}]
    source.write_text("".join(json.dumps(pair | row) + "\n" for row in more))
    convert([DataSpec(path=str(source))], out, to="preference", seed=0, columns=False)
    found = load_examples([DataSpec(path=str(out))], kind="preference", seed=0)
    assert [e.margin for e in found] == [0.5, None, 7.5, None]
    assert [e.label_prob for e in found] == [1.0, 0.9, 1.0, 1.0]


def test_split_sides_follow_the_hash_of_the_prompt_and_make_the_whole(tmp_path: Path):
    source = tmp_path / "in.jsonl"
    write_rows(clean_rows("preference", count=80), source, "jsonl")
    out, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    notes = convert_sides(
        [DataSpec(path=str(source))],
        out,
        heldout=heldout,
        heldout_frac=0.3,
        to="preference",
        seed=0,
        columns=True,
    )
    sides = {p: [row for row, _ in read_rows(str(p))] for p in (out, heldout)}
    for path, rows in sides.items():
        for row in rows:
            fraction = hash_fraction(row["prompt"][0]["content"])
            assert (fraction < 0.3) == (path == heldout)
    ids = [row["id"] for rows in sides.values() for row in rows]
    assert sorted(ids) == sorted(f"preference-0-{i}" for i in range(80))
    assert [note["output"]["rows"] for note in notes] == [len(rows) for rows in sides.values()]
    note = json.loads((tmp_path / "train.jsonl.provenance.json").read_text())
    assert note["inputs"][0]["files"][0]["rows"] == 80
    assert note["inputs"][0]["heldout_frac"] == 0.3


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = clean_rows("sft")
    rows[2]["messages"] *= 2
    write_rows(rows, source, "jsonl")
    spec = DataSpec(path=str(source))
    with pytest.raises(DataError, match=r"in.jsonl:3: only the last of several assistant turns"):
        convert([spec], out, to="prompt_completion", seed=0, columns=True)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    convert([spec], out, to="messages", seed=0, columns=False)
    with pytest.raises(DataError, match="the file already exists"):
        convert([spec], out, to="messages", seed=0, columns=False)


def test_microscope_shows_each_token_once_with_what_is_trained():
    chat_tokens = make_tokenizer(None)
    from align.data.render.chat import ChatFormat

    chat = ChatFormat(chat_tokens)
    row = {"prompt": "héé", "chosen": "漢!", "rejected": "no"}
    (example,) = to_examples(row, kind="preference", format="auto", source="f:1")
    chosen, rejected = views(example, chat)
    # One token a byte: h é é are 1 + 2 + 2 bytes, 漢! are 3 + 1, and each side has its stop.
    assert chosen.counts() == {"masked": 5, "trained": 4, "stop": 1}
    assert rejected.counts() == {"masked": 5, "trained": 2, "stop": 1}
    assert "".join(token.text for token in chosen.tokens) == "héé漢!</s>"
    assert as_text(chosen, colour=False).plain == "héé[漢!</s>\u2020]"
    assert as_html(rejected).count("<span") == 8
    assert "&lt;/s&gt;" in as_html(rejected)


@pytest.mark.parametrize(
    ("suffix", "value", "reason"),
    [
        ("parquet", [1, "x"], "note: .* 'x'"),
        ("parquet", [{}], "struct type 'note' with no child field"),
        ("jsonl", ["\ud800"], r"note: '\\ud800': .*surrogates not allowed"),
        ("json", [float("inf")], "note: inf: Out of range float values"),
    ],
)
def test_fields_that_a_file_type_cannot_store_are_named(tmp_path, suffix, value, reason):
    # Infinity would be written as what no reader of JSON takes.
    rows = [{"prompt": f"Q{i}", "completion": "A", "note": note} for i, note in enumerate(value)]
    text = "".join(json.dumps(row) + "\n" for row in rows).replace("Infinity", "1e999")
    (tmp_path / "in.jsonl").write_text(text)
    spec, out = DataSpec(path=str(tmp_path / "in.jsonl")), tmp_path / f"out.{suffix}"
    with pytest.raises(
        DataError, match=rf"out\.{suffix}: the rows have fields .*{reason}.*--no-col"
    ):
        convert([spec], out, to="messages", seed=0, columns=True)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    assert convert([spec], out, to="messages", seed=0, columns=False)["output"]["rows"] == len(rows)


def test_dates_and_bytes_of_typed_tables(tmp_path: Path):
    columns = {"prompt": ["Q"], "completion": ["A"], "day": [date(2024, 1, 2)]}
    source = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), source)
    convert([DataSpec(path=str(source))], tmp_path / "o.jsonl", to="messages", seed=0, columns=True)
    assert json.loads((tmp_path / "o.jsonl").read_text())["day"] == "2024-01-02"
    # Bytes are no JSON, but parquet has them.
    pyarrow.parquet.write_table(pyarrow.table(columns | {"raw": [b"\xff"]}), source)
    with pytest.raises(DataError, match=r"raw: b'\\xff': Object of type bytes"):
        convert(
            [DataSpec(path=str(source))], tmp_path / "p.json", to="messages", seed=0, columns=True
        )
    convert(
        [DataSpec(path=str(source))], tmp_path / "p.parquet", to="messages", seed=0, columns=True
    )
    assert next(read_rows(str(tmp_path / "p.parquet")))[0]["raw"] == b"\xff"
