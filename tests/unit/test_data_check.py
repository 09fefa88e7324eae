"""align data check: codes, findings with their place, exit codes, what the whole shows."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from align.core.errors import DataError
from align.data.check import Request, check_data
from align.data.check.findings import codes
from align.data.load import load_examples
from align.data.text.contamination import find_contamination
from align.recipe.schema import DataSpec

ROOT = Path(__file__).resolve().parents[2]
U = {"role": "user", "content": "Which river runs through Cairo?"}
A = {"role": "assistant", "content": "The Nile."}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def found(path: Path, **options) -> list[tuple[str, str]]:
    """Give code and place after the folder of every finding."""
    report = check_data(Request(path=str(path), limit=1000, **options))
    return [(f.code, f.source.rpartition("/")[2]) for f in report.tally.findings()]


def align(*words: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "align.cli", *words]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


def test_every_code_of_the_source_is_in_the_table_and_every_entry_is_used():
    used = set()
    for path in (ROOT / "align").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                used |= {node.value} if re.fullmatch(r"D\d{3}", node.value) else set()
    assert used == set(codes())
    for code in codes().values():
        assert code.severity in ("error", "warning")
        assert code.why.endswith((".", "?"))
        assert code.remedy.endswith(".")


def test_command_line_ends_with_2_on_errors_and_0_on_warnings(tmp_path: Path):
    rows = [{"messages": [U, A], "id": 1}, {"messages": [U, {**A, "role": "bot"}], "id": 2}]
    bad = write(tmp_path / "bad.jsonl", rows)
    done = align("data", "check", str(bad))
    assert done.returncode == 2, done.stderr
    out = done.stdout.decode()
    assert f"{bad}:2: messages[1]: role 'bot'" in out
    assert "did you mean 'assistant'" in out
    assert "\x1b" not in out
    done = align("data", "check", "-", "--json", stdin=json.dumps(rows[0]).encode() * 1)
    report = json.loads(done.stdout)
    assert (done.returncode, report["kind"], report["good_rows"]) == (0, "sft", 1)
    warned = write(tmp_path / "warned.jsonl", [rows[0], rows[0]])
    done = align("data", "check", str(warned), "--json")
    assert (done.returncode, json.loads(done.stdout)["counts"]) == (0, {"D090": 1})
    done = align("explain", "D070")
    assert (done.returncode, done.stdout.decode().splitlines()[0]) == (
        0,
        "D070 error: chosen equals rejected",
    )
    done = align("data", "check", str(warned), "--max-length", "5")
    assert done.returncode == 2
    assert b"--model" in done.stderr


def test_data_is_checked_without_torch_and_transformers(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"messages": [U, A]}])
    script = (
        "import sys; from align.data.check import *; "
        f"check_data(Request(path={str(path)!r})); "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_many_findings_of_one_code_are_counted_and_a_few_shown(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"messages": [U]}] * 50)
    report = check_data(Request(path=str(path), limit=3))
    assert report.tally.counts["D060"] == 50
    assert [f.source[-2:] for f in report.tally.findings()] == [":1", ":2", ":3"]


@pytest.mark.parametrize("workers", [1, 2])
def test_large_files_give_the_same_findings_in_one_process_and_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
):
    from align.data.check import run
    from align.data.reading import files as opening

    rows = [{"messages": [{**U, "content": f"How much is {i} and {i}?"}, A]} for i in range(300)]
    rows[200] = rows[100]
    rows[250] = {"messages": [U]}
    path = write(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(opening, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(run, "PARALLEL_BYTES", 0 if workers == 2 else 2**30)
    assert found(path) == [("D060", "a.jsonl:251"), ("D090", "a.jsonl:201")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_told(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"messages": [U, A]}])
    path.chmod(0)
    assert found(path) == [("D003", "a.jsonl")]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file that opens and fails")
def test_a_file_that_opens_but_cannot_be_read_is_told(tmp_path: Path):
    os.symlink("/proc/self/mem", tmp_path / "a.jsonl")  # its first page is not mapped: EIO
    report = check_data(Request(path=str(tmp_path / "a.jsonl")))
    (finding,) = report.tally.findings()
    assert finding.code == "D003"
    assert "cannot be read: Input/output error" in finding.found


def test_prompts_that_are_also_held_out_are_errors_with_both_places(tmp_path: Path):
    train = [{"prompt": f"What is {i} plus {i}?", "completion": f"{2 * i}"} for i in range(6)]
    held = [{"prompt": f"What is {i} plus {i}?"} for i in (10, 4, 11)]
    # Rows of messages are compared by their first user turn, whatever their answer.
    train[2] = {"prompt": [U], "completion": [A]}
    held.append({"messages": [U, {**A, "content": "Blue or White Nile?"}]})
    paths = [
        write(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("train", train), ("prompts", held[:3]), ("chats", held[3:]))
    ]
    done = align(
        "data",
        "check",
        str(paths[0]),
        "--json",
        *(word for path in paths[1:] for word in ("--heldout", str(path))),
    )
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout)
    assert report["counts"] == {"D100": 2}
    said = done.stdout.decode()
    for place, twin in ((5, "prompts.jsonl:2"), (3, "chats.jsonl:1")):
        assert f"train.jsonl:{place}" in said
        assert f"held out at {tmp_path / twin}" in said


def test_the_check_and_the_stages_find_the_same_evaluation_prompts(tmp_path: Path):
    words = "a train leaves the old station at noon and meets another one near dusk"
    assert words.count(" ") == 13
    question = write(
        tmp_path / "eval.jsonl",
        [
            {"prompt": words},
            {"prompt": "Name the five longest rivers of the old world now"},
            {"prompt": "Name the five longest rivers"},
            {"prompt": f"{words}, where a dog waits for them"},
        ],
    )
    said = [
        "He said: A train leaves the old station, at noon, and meets another one NEAR here.",
        "So A train leaves the old station, at noon, and meets another one near DUSK again",
        "name the five longest rivers of the old world now!",
        "now name the five longest rivers of the old world now",
        "Name the five longest rivers",
    ]
    # By hand, in runs of 13 words. Prompt 1 has 14 words, so 2 runs; row 1 has one of them, row 2
    # both. Prompt 2 has 9 words: a turn must be exactly these, as in row 3. Prompt 3 is too short.
    # Prompt 4 has 20 words, so 8 runs, of which rows 1 and 2 have 2 together: too few.
    rows = [{"prompt": f"Question {i}", "completion": text} for i, text in enumerate(said)]
    path = write(tmp_path / "train.jsonl", rows)
    done = align("data", "check", str(path), "--eval", str(question), "--json")
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["counts"] == {"D101": 2}
    assert [finding["source"] for finding in report["findings"]] == [f"{path}:2", f"{path}:3"]
    train = load_examples([DataSpec(path=str(path))], kind="sft", seed=0)
    heldout = load_examples([DataSpec(path=str(question))], kind="prompts", seed=0)
    found = find_contamination(train, {"": heldout})[""]
    assert found.places == [(f"{question}:1", f"{path}:2"), (f"{question}:2", f"{path}:3")]


def test_a_hub_id_without_a_network_says_what_to_do(tmp_path: Path):
    # conftest.py has set the hub's own switches to offline, so nothing is waited for.
    done = align("data", "check", "someone/some-data")
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stdout.decode().split())
    assert "D011 error" in said
    assert "someone/some-data: no such file or folder, and it cannot be loaded from the hub" in said
    assert "download the dataset on a machine with network access and use its folder" in said
    with pytest.raises(DataError, match="cannot be loaded from the hub"):
        load_examples([DataSpec(path="someone/some-data:test")], kind="sft", seed=0)


def test_the_table_of_codes_in_the_docs_is_the_one_that_is_printed():
    done = align("explain")
    printed = done.stdout.decode().strip()
    assert len(printed.splitlines()) == len(codes())
    assert printed in (ROOT / "docs" / "data-check.md").read_text(encoding="utf-8")


KILLED = """
import os, signal, sys
from align.core.errors import DataError
from align.data.check import run
run.PARALLEL_BYTES = 0
run.os.sched_getaffinity = lambda pid: {0, 1}
run.BatchChecker.check = lambda self, batch: os.kill(os.getpid(), signal.SIGKILL)
try:
    run.check_data(run.Request(sys.argv[1]))
except DataError as error:
    print(error)
"""


def test_a_check_whose_process_is_killed_ends_with_an_error(tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", [{"messages": [U, A]}] * 3)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(rows)],
        **{"capture_output": True, "text": True, "timeout": 300, "check": True},
    )
    assert f"{rows}: a process that checked rows was killed" in done.stdout
