"""Files that are damaged as files: bytes, packing, syntax, tables, and files that are no data."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tests.fault_corpus import AT, Case, clean_rows, write_rows

LINE = AT + 1


def file_cases(folder: Path) -> Iterator[tuple[Case, Path]]:
    """Write one file for each damage and each format that it applies to."""
    lines = [json.dumps(row).encode() for row in clean_rows("sft")]
    yield from _line_cases(folder, lines)
    yield from _array_cases(folder, lines)
    yield from _byte_cases(folder, lines)
    yield from _packed_cases(folder)
    yield from _table_cases(folder)
    yield from _foreign_cases(folder)


def _write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _line_cases(folder: Path, lines: list[bytes]) -> Iterator[tuple[Case, Path]]:
    damaged = {
        "comma missing": (lines[AT].replace(b", ", b" ", 1), "D030"),
        "single quotes": (lines[AT].replace(b'"', b"'"), "D030"),
        "comma at the end": (lines[AT][:-1] + b",}", "D030"),
        "row cut": (lines[AT][:40], "D031"),
        "a list as row": (b'["user", "assistant"]', "D032"),
        "a text as row": (b'"only text"', "D032"),
        "NaN": (lines[AT][:-1] + b', "margin": NaN}', "D033"),
        "two rows on a line": (lines[AT] + b" " + lines[AT], "D030"),
        "raw tab in a text": (lines[AT].replace(b"tell", b"te\tll", 1), "D030"),
        "half of a surrogate pair": (lines[AT].replace(b"tell", b"\\ud83d", 1), "D023"),
        "Latin-1 byte": (lines[AT].replace(b"tell", b"caf\xe9", 1), "D020"),
        "NUL byte": (lines[AT].replace(b"tell", b"te\0ll", 1), "D022"),
        "blank line": (b"", "D038"),
    }
    for i, (fault, (line, code)) in enumerate(damaged.items()):
        content = b"\n".join([*lines[:AT], line, *lines[AT + 1 :]]) + b"\n"
        path = _write(folder, f"line{i}.jsonl", content)
        yield Case(fault, "jsonl", code, f":{LINE}"), path
        path = _write(folder, f"line{i}.jsonl.gz", gzip.compress(content))
        yield Case(fault, "jsonl.gz", code, f":{LINE}"), path
        crlf = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
        path = _write(folder, f"crlf{i}.jsonl", crlf)
        yield Case(fault, "jsonl, BOM, CRLF", code, f":{LINE}"), path


def _array_cases(folder: Path, lines: list[bytes]) -> Iterator[tuple[Case, Path]]:
    damaged = {
        "comma missing": (lines[AT].replace(b", ", b" ", 1), "D030"),
        "a text as row": (b'"only text"', "D032"),
        "Latin-1 byte": (lines[AT].replace(b"tell", b"caf\xe9", 1), "D020"),
        "half of a surrogate pair": (lines[AT].replace(b"tell", b"\\ud83d", 1), "D023"),
        "NaN": (lines[AT][:-1] + b', "margin": NaN}', "D033"),
    }
    for i, (fault, (line, code)) in enumerate(damaged.items()):
        content = b"[\n" + b",\n".join([*lines[:AT], line, *lines[AT + 1 :]]) + b"\n]\n"
        yield Case(fault, "json", code, f":{LINE + 1}"), _write(folder, f"a{i}.json", content)
    content = b"[\n" + b",\n".join(lines[: AT + 1])
    yield (
        Case("row cut", "json", "D031", f":{LINE + 1}"),
        _write(folder, "cut.json", content[:-30]),
    )


def _byte_cases(folder: Path, lines: list[bytes]) -> Iterator[tuple[Case, Path]]:
    text = b"\n".join(lines).decode()
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        path = _write(folder, f"{encoding}.jsonl", text.encode(encoding))
        yield Case(f"{encoding} encoding", "jsonl", "D021", ":1"), path
    for fault, content in {"empty file": b"", "blank file": b"\n \n\n"}.items():
        for form in ("jsonl", "json", "csv", "txt"):
            path = _write(folder, f"{fault[:5]}.{form}", content)
            yield Case(fault, form, "D012", ""), path
    yield (
        Case("header only", "csv", "D012", ""),
        _write(folder, "head.csv", b"prompt,completion\n"),
    )
    yield Case("empty array", "json", "D012", ""), _write(folder, "none.json", b"[]")


def _packed_cases(folder: Path) -> Iterator[tuple[Case, Path]]:
    rows = clean_rows("sft")
    for form, code in (("jsonl.gz", "D009"), ("parquet", "D010"), ("arrow", "D010")):
        path = folder / f"whole.{form}"
        write_rows(rows, path, form)
        content = path.read_bytes()
        path.unlink()
        cut = _write(folder, f"cut.{form}", content[: int(0.6 * len(content))])
        yield Case("file cut", form, code, ""), cut


def _table_cases(folder: Path) -> Iterator[tuple[Case, Path]]:
    for name, separator in (("csv", ","), ("tsv", "\t"), ("csv, ;", ";")):
        plain = [f"What is {i}?{separator}It is {i}." for i in range(24)]
        damaged = {
            "a cell too many": (plain[AT] + separator + "more", "D035"),
            "a cell too few": ("What?", "D035"),
            "empty cell": (f"What?{separator}", "D054"),
            "Latin-1 byte": (plain[AT].replace("What", "caf\xe9"), "D020"),
        }
        for i, (fault, (row, code)) in enumerate(damaged.items()):
            rows = [separator.join(["prompt", "completion"]), *plain[:AT], row, *plain[AT + 1 :]]
            suffix = name.partition(",")[0]
            path = folder / f"t{i}{ord(separator)}.{suffix}"
            path.write_bytes("\n".join(rows).encode("latin-1"))
            yield Case(fault, name, code, f":{LINE + 1}"), path
        twice = _write(
            folder,
            f"twice{ord(separator)}.{suffix}",
            separator.join(["prompt", "prompt\na", "b\n"]).encode(),
        )
        yield Case("column name twice", name, "D036", ":1"), twice
        quoted = f'prompt{separator}completion\na{separator}b\n"c{separator}d\n'
        path = _write(folder, f"quote{ord(separator)}.{suffix}", quoted.encode())
        yield Case("quote not closed", name, "D037", ":3"), path


def _foreign_cases(folder: Path) -> Iterator[tuple[Case, Path]]:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    page = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"
    for form in ("jsonl", "json", "csv", "parquet", "txt"):
        path = _write(folder, f"lfs.{form}", pointer)
        yield Case("Git LFS pointer", form, "D006", ":1"), path
        yield Case("web page", form, "D007", ":1"), _write(folder, f"page.{form}", page)
    archive = _write(folder, "zip.jsonl", b"PK\x03\x04" + bytes(40))
    yield Case("zip archive", "jsonl", "D008", ""), archive
    yield Case("unknown suffix", "xml", "D005", ""), _write(folder, "rows.xml", b"<a/>")
    yield Case("no such file", "jsonl", "D001", ""), folder / "absent.jsonl"
    link = folder / "link.jsonl"
    link.unlink(missing_ok=True)
    os.symlink(folder / "gone.jsonl", link)
    yield Case("dangling link", "jsonl", "D002", ""), link
    circle = folder / "circle.jsonl"
    circle.unlink(missing_ok=True)
    os.symlink(circle, circle)
    yield Case("link to itself", "jsonl", "D003", ""), circle
    empty = folder / "nothing"
    empty.mkdir(exist_ok=True)
    yield Case("folder without data", "folder", "D004", ""), empty
    rows = [json.dumps(row) for row in clean_rows("sft", 1)]
    mixed = folder / "mixed"
    mixed.mkdir(exist_ok=True)
    (mixed / "a.jsonl").write_text("\n".join(rows))
    others = [json.dumps(row) for row in clean_rows("sft", 2)]
    (mixed / "b.jsonl").write_text("\n".join(["{", *others]))
    yield Case("one bad file of two", "folder", "D031", "/b.jsonl:1"), mixed
