"""Templates, files and functions of strangers are bounded in time, memory and output."""

import bz2
import gzip
import json
import resource
import threading
import time
import zlib
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from align.core.errors import DataError
from align.core.types import Example
from align.data.formats.tools import schemas_of
from align.data.reading import bounds
from align.data.reading.sources import scan_rows
from align.data.render.chat import ChatFormat
from align.data.wordings import read_wordings, word_row
from reward_models import build_reward, limits, worker
from tests.unit.small_tokenizers import byte_tokenizer

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "exponential": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "arithmetic": "{{ 7 ** (3 * 10 ** 7) }}",
}
LARGE = {
    "product": "{{ 'x' * 10000000000 }}",
    "padding": "{{ 'x'.center(9999999999) }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "replacement": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "text": "{{ 'x' * 100000000 }}",
}
TURNS = Example([{"role": "user", "content": "a"}], source="rows.jsonl:7")


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TEMPLATE_S", 0.5)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("name", ENDLESS)
def test_a_chat_template_without_end_is_one_line_with_template_time_and_row(name: str) -> None:
    tokenizer = byte_tokenizer(ENDLESS[name])
    tokenizer.name_or_path = "models/evil"
    chat = ChatFormat(tokenizer)
    with pytest.raises(DataError) as told:
        chat.prompt_row(TURNS)
    assert str(told.value).startswith(
        "rows.jsonl:7: the chat template of models/evil ran for 0.5 s on one row without an end"
    )
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("_quick")
def test_after_one_row_without_end_the_template_renders_no_other() -> None:
    template = f"{{% if messages[0]['content'] == 'a' %}}{ENDLESS['loops']}{{% endif %}}"
    chat = ChatFormat(byte_tokenizer(template))
    with pytest.raises(DataError, match=r"^rows.jsonl:7: .* ran for"):
        chat.prompt_row(TURNS)
    with pytest.raises(DataError, match=r"^b:1: not rendered: .* ran for .*rows.jsonl:7"):
        chat.prompt_row(Example([{"role": "user", "content": "b"}], source="b:1"))


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_takes_gigabytes_is_one_line(name: str) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: .* (MiB of memory|characters)") as told:
        ChatFormat(byte_tokenizer(LARGE[name])).prompt_row(TURNS)
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("text", [ENDLESS["loops"], LARGE["product"]])
def test_a_template_of_instructions_has_the_same_limits(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps([{"name": "ask", "prompt": text}]))
    with pytest.raises(DataError, match=r"template 'ask'.* (ran for|takes more than)"):
        word_row({"q": "a"}, "rows.jsonl:3", templates=str(path), phrasing="all", seed=0)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text", ["- &a [x, x]\n" + "- " + "[" * 5000, "- 2024-99-99\n", f"- {{{BOMB!r}: 1}}\n", ""]
)
def test_a_hostile_file_of_instructions_is_an_error_with_its_name(
    text: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"t\.yaml: "):
        read_wordings(str(path))


@pytest.mark.parametrize("header", ["- " + "[" * 5000, "- 2024-99-99"])
def test_a_hostile_card_of_a_dataset_is_one_line(header: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"README\.md: the card's header is not valid YAML"):
        errors(tmp_path)


def test_limits_that_are_set_up_once_hold_for_each_of_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import signal

    monkeypatch.setattr(limits, "TEMPLATE_S", 0.3)
    monkeypatch.setattr(limits, "TEMPLATE_MIB", 64)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)

    def spin(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    with limits.many_rows(), limits.many_rows():
        for _ in range(6):  # together far more than the time of one row
            with limits.template_limits("t"):
                spin(0.1)
            spin(0.1)  # what is done between the rows is not the template's time
        for row in range(130):
            too_large = pytest.raises(limits.LimitError, match=r"^t takes more than 64 MiB")
            with too_large, limits.template_limits("t"):
                bytearray(2**27)
            if row % 64 < 2:
                too_long = pytest.raises(limits.LimitError, match=r"^t ran for 0\.3 s")
                with too_long, limits.template_limits("t"):
                    spin(60.0)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_another_time_limit_inside_leaves_that_of_many_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "TEMPLATE_S", 0.3)

    def spin() -> None:
        end = time.process_time() + 60.0
        while time.process_time() < end:
            pass

    with limits.many_rows():
        with limits.time_limit(60.0):
            pass
        too_long = pytest.raises(limits.LimitError, match=r"^t ran for 0\.3 s")
        with too_long, limits.template_limits("t"):
            spin()


def test_the_limits_leave_the_process_as_it_was_and_hold_in_every_thread() -> None:
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    found: list[str] = []

    def run() -> None:
        try:
            with limits.time_limit(0.3):
                while True:
                    pass
        except limits.LimitError:
            found.append("stopped")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=120)
    run()
    with limits.memory_limit(64), pytest.raises(MemoryError):
        bytearray(2**27)
    assert found == ["stopped", "stopped"]
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def errors(path: Path | str) -> list[str]:
    return [str(row) for row, _ in scan_rows(str(path)) if isinstance(row, DataError)]


def packed(path: Path, size: int, *, head: bytes = b"", line: bytes = b"") -> Path:
    """Write a gzip file of that many bytes, without holding them."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    piece = (line * (2**20 // len(line) + 1)) if line else b"a" * 2**20
    with path.open("wb") as f:
        f.write(compressor.compress(head))
        for _ in range(size // len(piece)):
            f.write(compressor.compress(piece))
        f.write(compressor.flush())
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_a_packed_file_of_one_endless_row_ends_at_the_limit(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_ROW", 2**23)
    found = errors(packed(tmp_path / f"d{suffix}.gz", 2**26, head=b'["'))
    assert len(found) == 1
    assert "ALIGN_MAX_UNPACKED_GIB" in found[0]
    assert "\n" not in found[0]


def test_many_rows_out_of_few_bytes_end_at_the_ratio_and_the_key_raises_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_ROW", 2**22)
    row = b'{"text": "' + b"a" * 9_000 + b'"}\n'
    path = packed(tmp_path / "d.jsonl.gz", 2**24, line=row)
    (found,) = errors(path)
    assert "over 100 times their size. If you trust the file, raise the limit with" in found
    monkeypatch.setenv("ALIGN_MAX_UNPACKED_GIB", "0.005")
    (found,) = errors(path)
    assert "unpacks to more than 0.005 GiB" in found
    monkeypatch.setenv("ALIGN_MAX_UNPACKED_GIB", "1")
    assert errors(path) == []
    monkeypatch.setenv("ALIGN_MAX_UNPACKED_GIB", "much")
    assert errors(path)[0].startswith("ALIGN_MAX_UNPACKED_GIB: found 'much', expected a positive")


def table_of(kind: str) -> pyarrow.Table:
    if kind == "repeated":  # one text of 2 MiB, 100,000 times: 200 GB out of some kilobytes
        texts = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array([0] * 100_000, pyarrow.int32()), pyarrow.array(["a" * 2**21])
        )
        return pyarrow.table({"text": texts})
    # 20 million rows that are empty
    return pyarrow.table({"text": pyarrow.nulls(20_000_000, pyarrow.string())})


@pytest.mark.parametrize("kind", ["repeated", "empty"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_table_of_few_bytes_and_gigabytes_of_rows_ends_at_a_limit(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_ROW", 2**24)
    path, table = tmp_path / f"d{suffix}", table_of(kind)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, compression="zstd")
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.ipc.new_file(str(path), table.schema, options=options) as writer:
            writer.write_table(table)
    monkeypatch.setattr(bounds, "MAX_BATCH", 2**28)
    (found,) = errors(path)
    assert "ALIGN_MAX_UNPACKED_GIB" in found
    assert "\n" not in found


def test_an_arrow_file_whose_offsets_leave_the_file_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path, table = tmp_path / "d.arrow", pyarrow.table({"text": ["abc"]})
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    content = bytearray(path.read_bytes())
    end = content.rfind(b"\3\0\0\0", 0, content.index(b"abc\0"))  # where the text ends
    content[end : end + 4] = (2**30).to_bytes(4, "little")
    path.write_bytes(content)
    (found,) = errors(path)
    assert "broken arrow" in found


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (b"BZh91AY&SY", "packed by bzip2"),
        (b"\xfd7zXZ\x00", "packed by xz"),
        (b"\x28\xb5\x2f\xfd", "packed by zstd"),
        (b"PK\x03\x04", "a zip archive"),
    ],
)
def test_other_packed_files_are_refused_before_anything_is_unpacked(
    head: bytes, told: str, tmp_path: Path
) -> None:
    for name in ("d.jsonl", "d.json", "d.csv", "d.parquet"):
        path = tmp_path / name
        path.write_bytes(head + bytes(64))
        (found,) = errors(path)
        assert told in found


def test_a_plain_gzip_file_is_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 3))
    assert [row for row, _ in scan_rows(str(path))] == [{"text": "a"}] * 3


def test_a_reward_that_prints_without_end_fills_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "MAX_PRINTED", 10_000)
    code = tmp_path / "mine.py"
    code.write_text(
        "def score(completions):\n"
        "    while completions[0] == 'print': print('x' * 1000, flush=True)\n"
        "    return [1.0 for _ in completions]\n"
    )
    reward = build_reward({"kind": "python", "path": f"{code}:score", "deadline_s": 2.0})
    assert reward(prompts=["?"], completions=["print"]) == [None]
    assert reward(prompts=["?"], completions=["b"]) == [1.0]
    printed = capfd.readouterr().err
    assert 10_000 <= len(printed) < 30_000
    assert "printed more than 10,000 bytes; the rest is left out" in printed


def test_a_template_file_of_aliases_is_refused_before_they_are_expanded(tmp_path: Path) -> None:
    """Six levels of twenty aliases each stand for 64 million values."""
    lines = ["- &a [" + ", ".join(["x"] * 20) + "]"]
    lines += [
        f"- &{n} [{', '.join([f'*{i}'] * 20)}]" for n, i in zip("bcdef", "abcde", strict=True)
    ]
    path = tmp_path / "templates.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(
        DataError, match=r"templates\.yaml: not valid YAML: more than 1,000,000 values"
    ):
        read_wordings(str(path))


def test_text_that_is_nested_too_deeply_is_no_tool_schema() -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:1: tools\[0\]: expected the schema of a tool"):
        schemas_of("[" * 100_000, where="x.jsonl:1: tools")


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_memory_limits_of_two_threads_leave_none_behind(first_ends_first: bool) -> None:
    """Each block saw the other's limit as the one before; the last to end restored that one."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with limits.memory_limit(4096):
            entered.set()
            assert leave.wait(120)

    thread = threading.Thread(target=second)
    with limits.memory_limit(2048):
        thread.start()
        assert entered.wait(120)
        assert resource.getrlimit(resource.RLIMIT_AS) != before
        if not first_ends_first:
            leave.set()
            thread.join(120)
            assert resource.getrlimit(resource.RLIMIT_AS) != before
    leave.set()
    thread.join(120)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that stands for the data set owner/set of the hub."""
    folder, builder = tmp_path / "set", datasets.load_dataset_builder
    folder.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda name, *_, **__: builder(str(folder))
    )
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *_, **__: load(str(folder), split="train")
    )
    return folder


def test_a_data_set_of_the_hub_unpacks_within_the_limits(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_ROW", 2**22)
    row = b'{"text": "' + b"a" * 9_000 + b'"}\n'
    packed(hub / "train.jsonl.gz", 2**24, line=row)
    (found,) = errors("owner/set")
    assert found.startswith("owner/set: train.jsonl.gz: ")
    assert "over 100 times their size" in found
    assert not list(hub.parent.glob("cache/**/*.arrow"))  # nothing was unpacked
    monkeypatch.setenv("ALIGN_MAX_UNPACKED_GIB", "1")
    assert errors("owner/set") == []
    # The library has its own copy now, so nothing is unpacked again.
    monkeypatch.delenv("ALIGN_MAX_UNPACKED_GIB")
    rows = [row for row, _ in scan_rows("owner/set")]
    assert len(rows) > 1000
    assert rows[0] == {"text": "a" * 9_000}


def test_an_archive_of_the_hub_is_read_only_if_the_user_trusts_it(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hub / "train.jsonl").write_bytes(bz2.compress(b'{"text": "a"}\n'))
    (found,) = errors("owner/set")
    assert "train.jsonl: its unpacked size is unknown. If you trust the file" in found
    monkeypatch.setenv("ALIGN_MAX_UNPACKED_GIB", "1")
    assert [row for row, _ in scan_rows("owner/set")] == [{"text": "a"}]


def test_a_good_data_set_of_the_hub_is_read_as_the_library_reads_it(hub: Path) -> None:
    (hub / "train.jsonl").write_text('{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n')
    found = [row for row, _ in scan_rows("owner/set")]
    assert found == [dict(row) for row in datasets.load_dataset("owner/set")]
