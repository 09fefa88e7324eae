"""Reading rows and the place of every row."""

import gzip
import hashlib
import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from align.core.errors import DataError
from align.data.reading.sources import data_fingerprint, read_rows

ROWS = [{"a": 1, "b": "x\u2028y"}, {"a": 2, "b": 'quote "q", comma'}]


def read(path: Path | str) -> list[tuple]:
    return [(row, source.rpartition("/")[2]) for row, source in read_rows(str(path))]


def test_json_lines_have_line_numbers_and_skip_blank_lines(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps(ROWS[0], ensure_ascii=False) + "\r\n\r\n" + json.dumps(ROWS[1])
    file = tmp_path / "r.jsonl"
    file.write_bytes(text.encode("utf-8"))
    assert read(file) == [(ROWS[0], "r.jsonl:1"), (ROWS[1], "r.jsonl:3")]
    packed = tmp_path / "r.jsonl.gz"
    packed.write_bytes(gzip.compress(text.encode("utf-8")))
    assert [row for row, _ in read(packed)] == ROWS


def test_json_may_be_an_array_an_object_or_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(ROWS, indent=1))
    # [ is line 1; each object takes 4 lines from line 2 on.
    assert read(file) == [(ROWS[0], "r.json:2"), (ROWS[1], "r.json:6")]
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert read(file) == [(ROWS[0], "r.json:1"), (ROWS[1], "r.json:2")]
    file.write_text(json.dumps(ROWS[0], indent=1))
    assert read(file) == [(ROWS[0], "r.json:1")]
    file.write_text("[]")
    assert read(file) == []


def test_tables_have_the_line_a_row_starts_on(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    file.write_text('a,b\n1,"two\nlines"\n2,"say ""x"""\n')
    assert read(file) == [
        ({"a": "1", "b": "two\nlines"}, "r.csv:2"),
        ({"a": "2", "b": 'say "x"'}, "r.csv:4"),
    ]
    file = tmp_path / "r.tsv"
    file.write_text("a\tb\n1\tx,y\n")
    assert read(file) == [({"a": "1", "b": "x,y"}, "r.tsv:2")]


def test_parquet_gives_nested_rows(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}]}, {"messages": []}]
    file = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read(file) == [(rows[0], "r.parquet:row 1"), (rows[1], "r.parquet:row 2")]
    values = pyarrow.array([0.1, None, 3.0, 1e-8], pyarrow.float32())
    pyarrow.parquet.write_table(pyarrow.table({"answer": values}), file)
    assert [row["answer"] for row, _ in read(file)] == [0.1, None, 3.0, 1e-8]
    file.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="broken parquet"):
        read(file)


def test_text_is_cut_at_blank_lines_or_end_marks(tmp_path: Path) -> None:
    file = tmp_path / "r.txt"
    file.write_text("one\nmore\n\n\ntwo\n")
    assert read(file) == [("one\nmore", "r.txt:1"), ("two", "r.txt:5")]
    file.write_text("\none\n\nmore\n<|endoftext|>\ntwo\n")
    assert read(file) == [("one\n\nmore", "r.txt:2"), ("two", "r.txt:6")]


@pytest.mark.parametrize("separator", [";", ",", "\t"])
def test_a_first_line_may_state_the_separator_of_a_table(tmp_path: Path, separator: str) -> None:
    # Excel writes this line; the cell below contains the other separators.
    lines = [f"sep={separator}", separator.join("ad"), separator.join(('"1,5;2"', "3"))]
    for mark in ("", "\ufeff"):
        (tmp_path / "r.csv").write_text(mark + "\n".join(lines), encoding="utf-8")
        assert read(tmp_path / "r.csv") == [({"a": "1,5;2", "d": "3"}, "r.csv:3")]


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps({"from": name}))
    (tmp_path / "notes.md").write_text("no data")
    assert [s for _, s in read(tmp_path)] == ["a.jsonl:1", "b.jsonl:1"]
    assert [s for _, s in read(tmp_path / "*.jsonl")] == ["a.jsonl:1", "b.jsonl:1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b'{"a": 1}\n{"a" 2}\n', r"r.jsonl:2:6: broken JSON: Expecting ':' delimiter"),
        ("r.jsonl", b'{"a": NaN}\n', "r.jsonl:1: broken JSON: NaN is not JSON"),
        ("r.jsonl", b'{"a": 1, "a": 2}\n', "r.jsonl:1: broken JSON: key 'a' appears twice"),
        ("r.json", b'[{"a": {"b": 1, "b": 2}}]', "r.json:1: broken JSON: key 'b' appears twice"),
        ("r.jsonl", b"[1, 2]\n", "r.jsonl:1: expected an object with named fields"),
        ("r.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "r.jsonl:2: byte 0xff is not UTF-8"),
        ("r.json", b'[\n{"a": 1},\n{"a": }\n]', r"r.json:3:7: broken JSON: Expecting value"),
        ("r.json", b'[\n{"a": 1},\n"b"\n]', "r.json:3: expected an object"),
        ("r.csv", b"a,b\n1,2\n3\n", "r.csv:3: 1 cells, but the header has 2"),
        ("r.csv", b"a,a\n1,2\n", "r.csv:1: a column name occurs twice"),
        ("r.xml", b"<a/>", "r.xml: unknown file type"),
        ("r.xlsx", b"PK", "r.xlsx: unknown file type; save its rows as one of .jsonl"),
        (
            "r.jsonl",
            b'{\n"a": 1\n}\n',
            "rename the file to .json if its objects span several lines",
        ),
        ("r.jsonl", b"{'a': 1}\n", "Python's quotes: write the rows with json.dumps"),
        ("r.jsonl", b'{"a": 1},\n{"a": 2}\n', "one object per line, without a comma after it"),
        ("r.csv", b"a,b\r1,2\r", "its lines end in carriage returns alone"),
        ("r.csv", b'a,b\n"is "so" it",2\n', "a quote inside of a quoted cell is written twice"),
        ("r.csv", b'a,b\n"x,2\n3,4\n', "a quote that opens a cell in this row is never closed"),
        ("r.csv", b'{"prompt": "a", "b": 1}\n' * 2, "JSON Lines, which a .csv file would split"),
        ("r.jsonl.gz", b"not gzip", "r.jsonl.gz:1:1: broken JSON"),
        ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "r.jsonl.gz: broken gzip"),
    ],
)
def test_broken_files_name_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", b'{"prompt": "a", "chosen": "b", "chosen": "c"}\n'),
        ("r.json", b'[{"turn": {"role": "user", "role": "tool"}}]'),
    ],
)
def test_key_twice_has_the_code_of_a_column_twice(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        read(tmp_path / name)
    assert refused.value.code == "D036"


def test_missing_files_are_not_taken_for_hub_ids(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", "data/none.jsonl", "none", "/none/there"):
        with pytest.raises(DataError, match="no such file, folder or glob"):
            read(path)
    for name in ("${ALIGN_SURELY_UNSET}", "$ALIGN_SURELY_UNSET"):
        with pytest.raises(DataError, match=rf"variable {re.escape(name)} is not set"):
            read(f"{name}/x.jsonl")


def test_a_name_with_a_dollar_sign_is_no_variable(tmp_path: Path) -> None:
    (tmp_path / "$PRICES.jsonl").write_text('{"prompt": "a"}\n')
    assert len(read(tmp_path / "$PRICES.jsonl")) == 1
    with pytest.raises(DataError, match="no such file, folder or glob"):
        read(tmp_path / "5$.jsonl")


def test_fingerprint_has_the_hash_of_the_bytes_and_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": 2}\n')
    expected = hashlib.sha256(b'{"a": 1}\n\n{"a": 2}\n').hexdigest()
    assert data_fingerprint(str(file)) == [{"path": str(file), "sha256": expected, "rows": 2}]


def test_hidden_files_of_a_folder_are_copies_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    # Of Jupyter, macOS, and the hub's client.
    for name in (".ipynb_checkpoints/rows-checkpoint.jsonl", "__MACOSX/._rows.jsonl", ".x/y.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"a": 1}\n')
    assert read(tmp_path) == [({"a": 1}, "rows.jsonl:1")]
    card = "---\nconfigs:\n- config_name: default\n  data_files: '**/*.jsonl'\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert read(tmp_path) == [({"a": 1}, "rows.jsonl:1")]


def test_dates_and_decimals_of_typed_tables_are_values_of_json(tmp_path: Path) -> None:
    when = datetime(2024, 1, 2, 3, tzinfo=UTC)
    columns = {
        "day": [when.date()],
        "when": [when],
        "at": [when.time()],
        "took": [timedelta(seconds=90)],
        "price": [Decimal("1200.00")],
        "deep": [{"rate": [Decimal("0.10")], "day": when.date()}],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    expected = {
        "day": "2024-01-02",
        "when": "2024-01-02 03:00:00+00:00",
        "at": "03:00:00",
        "took": "0:01:30",
        "price": 1200,
        "deep": {"rate": [0.1], "day": "2024-01-02"},
    }
    ((row, _),) = read(tmp_path / "t.parquet")
    assert json.loads(json.dumps(row)) == row == expected


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[{"a": 1},]', "1:11"),
        ('[{"a": 1},\n  {"b": 2},,]', "2:12"),
        ('[{"a": 1}, {"b": tru}]', "1:18"),
        ('{"a": 1} {"b":}', "1:15"),
        # The second object begins after the first part of the file that is read at once.
        ('[\n{"a": "' + "x" * 200_000 + '"}, {"b" 2}]', "2:200017"),
    ],
    ids=["comma at the end", "two commas", "word", "no value", "long line"],
)
def test_broken_element_of_an_array_has_its_line_and_column(
    tmp_path: Path, text: str, place: str
) -> None:
    """Counted by hand, from 1: the character at which the value should begin."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=rf"a\.json:{place}: broken JSON"):
        list(read_rows(str(tmp_path / "a.json")))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize(("depth", "fits"), [(99, True), (100, False), (700, False), (5000, False)])
@pytest.mark.parametrize("wide", [1, 200])
def test_rows_nested_too_deeply_are_refused_with_their_line(
    tmp_path: Path, name: str, depth: int, fits: bool, wide: int
) -> None:
    deep = "[" * (depth - 1) + ", ".join(["{}"] * wide) + "]" * (depth - 1)
    row = f'{{"prompt": "a", "x": {deep}}}'
    text = f'{{"prompt": "b"}}\n{row}\n' if name == "x.jsonl" else f'[{{"prompt": "b"}},\n{row}]'
    (tmp_path / name).write_text(text)
    if fits:  # the row itself is the first level
        assert len(read(tmp_path / name)) == 2
        return
    with pytest.raises(DataError, match=rf"{name}:2: lists and objects nested more than 100") as e:
        read(tmp_path / name)
    assert e.value.code == "D039"
