"""Hostile recipes are refused within bounds, and no text drives the terminal."""

import io
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from align.core.errors import RecipeError
from align.core.log import MetricsLog
from align.core.storage import storage_problem
from align.core.text import VisibleStream, visible
from align.pipeline.terminal import Terminal, sample_text
from align.recipe.source import read_source

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "billion laughs": (LAUGHS, "more than 50,000 values"),
    "deep by aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
        "more than 40 levels once aliases are expanded",
    ),
    "deep flow": ("a: " + "[" * 100_000 + "]" * 100_000, "nested more than 40 deep"),
    "deep and open": ("a: " + "[" * 5_000, "nested more than 40 deep"),
    "deep block": ("\n".join(" " * i + "a:" for i in range(600)), "nested more than 40 deep"),
    "large": ("a: " + "x" * 5_000_000, "characters; expected at most"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_recipe_that_would_exhaust_the_machine_is_refused_at_once(name, tmp_path: Path) -> None:
    text, told = HOSTILE[name]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(RecipeError, match=told):
        read_source(path)
    assert time.process_time() - began < 5.0


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("1e999", "expected a finite number"),
        ("-1e999", "expected a finite number"),
        ("1" + "0" * 30, "expected a number below 2\\^63"),
        ("1e30", "expected a finite number below 2\\^63"),
        ("9" * 5000, "found"),
        ("${HUGE}", "expected a finite number"),
    ],
)
def test_numbers_without_bound_are_an_error_with_their_place(
    value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.setenv("HUGE", "1e999")
    path = tmp_path / "r.yaml"
    path.write_text(f"a:\n  rate: {value}\n")
    found = read_source(path).errors
    assert len(found) == 1
    assert re.search(rf"r\.yaml:2:9: a\.rate: .*{told}", found[0])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("steps", "2000000000000", "<= 1000000000000"),
        ("batch_size", "2000000000000", "<= 1048576"),
        ("optim", "{learning_rate: 1.0e+10}", "<= 1000"),
    ],
)
def test_counts_and_rates_that_no_run_can_have_are_errors(
    key: str, value: str, told: str, tmp_path: Path
) -> None:
    from align.recipe.load import load_recipe

    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nstages:\n  base: {kind: base, path: m}\n"
        f"  sft: {{kind: sft, init: base, data: [{{world: sft}}], {key}: {value}}}\n"
    )
    with pytest.raises(RecipeError, match=rf"r\.yaml:4:\d+: stages\.sft\.{key}.*{told}"):
        load_recipe(path)


def test_a_list_as_a_key_below_a_merge_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: &m {? [1] : 2}\nb:\n  <<: *m\n")
    assert any("as a key" in line for line in read_source(path).errors)


ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "link": "\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\",
    "8 bit": "\x9b2J\x9d0;x\x9c",
    "bidi": "\u202egnp.exe\u2066\u2069\u200f\u061c",
    "return": "real\rfake",
    "delete": "a\x7f\x08b",
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("tty", [True, False])
def test_no_text_of_a_model_or_log_reaches_the_terminal_raw(name: str, tty: bool) -> None:
    attack = ATTACKS[name]
    out = io.StringIO()
    terminal = Terminal(Console(file=out, force_terminal=tty, color_system=None, width=200))
    terminal.failed("sft", "exit code 1", log=Path("log.txt"), tail=[f"said: {attack}"], code=1)
    terminal.line(sample_text({"prompt": attack, "completion": attack, "score": 1.0}))
    stream = VisibleStream(out)
    stream.write(attack)
    found = set(out.getvalue())
    assert not found & {c for c in attack if not c.isprintable()}
    assert visible(attack) in out.getvalue()


def test_ordinary_text_is_shown_as_it_is() -> None:
    text = "naïve 日本語 🙂 a\tb\nשלום {x} [y]"
    assert visible(text) == text


DAMAGED = [b"\0\0\0\0\n", b"[]\n", b"null\n", b'{"no": 1}\n', b"\xff\xfe\n", b'{"step": "2"}\n']


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_metrics_is_left_out_on_resume(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "time_s": 2.0, "train/loss": 0.5}\n'
    path.write_bytes(good + line + b'{"step": 3, "time_s": 4.0}\n{"step": 3')
    log = MetricsLog(tmp_path, total_steps=9)
    assert log.rewind(1) == {"train/loss": 0.5}
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "no space left on"),
        (OSError(30, "Read-only file system"), "read-only"),
        (OSError(27, "File too large"), "ulimit -f"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9"), "no space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left on"),
    ],
)
def test_a_full_disk_is_one_line_with_the_device_and_what_is_needed(
    error: Exception, told: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.pt").write_bytes(bytes(3 * 2**20))
    line = storage_problem(error, tmp_path) or ""
    assert told in line
    assert "needs about 3 MiB" in line
    assert "MiB free" in line
    assert "\n" not in line
    assert storage_problem(RuntimeError("a loss is nan"), tmp_path) is None


SECRET = "sk-live-0123456789"
KEYED = """\
name: keyed
stages:
  base: {kind: base, path: some/model}
  ppo:
    kind: ppo
    init: base
    prompts: [{path: p.jsonl}]
    rewards: [{kind: remote, url: "https://scores.example/v1?key=${SCORES_KEY}"}]
    steps: 1
"""


def test_the_value_of_a_key_is_neither_written_nor_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.core import text
    from align.recipe.load import load_recipe, read_resolved, write_resolved

    monkeypatch.setattr(text, "_secrets", {})
    monkeypatch.setenv("SCORES_KEY", SECRET)
    path = tmp_path / "r.yaml"
    path.write_text(KEYED)
    recipe = load_recipe(path)
    address = f"https://scores.example/v1?key={SECRET}"
    assert recipe.stages["ppo"].rewards[0].url == address
    written = tmp_path / "recipe.yaml"
    write_resolved(recipe, written)
    assert SECRET not in written.read_text()
    assert SECRET not in visible(f"cannot reach {address}")
    text._secrets.clear()
    assert read_resolved(written) == recipe
    assert SECRET not in visible(address)
    monkeypatch.delenv("SCORES_KEY")
    with pytest.raises(RecipeError, match="SCORES_KEY"):
        read_resolved(written)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b"[" * 5_000, bytes(9), b"a: 1"])
def test_a_damaged_resolved_recipe_is_one_line(content: bytes, tmp_path: Path) -> None:
    from align.recipe.load import read_resolved

    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="cannot be read as a resolved recipe") as told:
        read_resolved(path)
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


def test_the_resolved_recipe_is_replaced_whole_never_overwritten(tmp_path: Path) -> None:
    """A second name of the old file keeps the old text; a write in place would change it."""
    from align.recipe.load import load_recipe, write_resolved

    path, written, second = (tmp_path / name for name in ("r.yaml", "recipe.yaml", "second"))
    path.write_text("name: r\nstages: {base: {kind: base, path: m}}\n")
    write_resolved(load_recipe(path), written)
    before = written.read_text()
    os.link(written, second)
    write_resolved(load_recipe(path, ["seed=7"]), written)
    assert second.read_text() == before
    assert "seed: 7" in written.read_text()


def test_the_report_for_a_bug_has_what_is_needed_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.core import text
    from align.doctor import Finding, report

    monkeypatch.setattr(text, "_secrets", {})
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pass-1234@hub.example/x")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SOMETHING_ELSE", "mine")
    for stage, age in (("old", 1), ("new", 2)):
        folder = tmp_path / "r" / stage
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text(
            f"first\n{'x' + chr(10)}" * 80 + f"{stage}: {SECRET}\x1b[2J"
        )
        (folder / "failure.txt").write_text(f"Traceback of {stage}")
        os.utime(folder / "log.txt", (age, age))
    found = report([Finding("torch", "2.0", "missing", "install it")], tmp_path)
    for part in (
        "torch",
        "install it",
        "OMP_NUM_THREADS=3",
        "new: ${HF_TOKEN}",
        "Traceback of new",
    ):
        assert part in found
    for part in (SECRET, "pass-1234", "mine", "old: ", "\x1b"):
        assert part not in found
    assert found.count("first") <= 60


def test_verify_reads_every_file_and_names_the_damaged_one(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from align.cli import cli
    from align.core.artifacts import write_manifest

    for stage in ("a", "b"):
        model = tmp_path / stage / "model"
        model.mkdir(parents=True)
        (model / "w.bin").write_bytes(bytes(9))
        write_manifest(tmp_path / stage, {"kind": "policy", "spec_hash": "0"})
    assert CliRunner().invoke(cli, ["verify", str(tmp_path)]).exit_code == 0
    file = tmp_path / "b" / "model" / "w.bin"
    times = file.stat()
    file.write_bytes(bytes(8) + b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = CliRunner().invoke(cli, ["verify", str(tmp_path)])
    assert found.exit_code == 2
    assert f"{file}: its sha256 differs" in found.output
