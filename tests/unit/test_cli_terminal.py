"""The command line in a real pseudo-terminal, without color, and in locales that are not UTF-8."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ALIGN = [sys.executable, "-m", "align"]
WRONG = "name: x\nstages:\n  s: {kind: sft, init: b, stepz: 1}\n"


def in_terminal(words: list[str], folder: Path, **env: str) -> tuple[int, str]:
    """Return the exit code and the output of a command whose output is a pseudo-terminal."""
    leader, follower = pty.openpty()
    given = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "LC_ALL", "LANG")}
    process = subprocess.Popen(
        [*ALIGN, *words],
        cwd=folder,
        env={**given, "TERM": "xterm", **env},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            block = os.read(leader, 4096)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        shown += block
    os.close(leader)
    return process.wait(timeout=300), shown.decode()


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(WRONG)
    return tmp_path


def test_an_error_is_red_in_a_terminal_and_plain_with_no_color(wrong: Path) -> None:
    code, shown = in_terminal(["check", "r.yaml"], wrong)
    assert code == 2
    assert "\x1b[31mr.yaml:3:27: stages.s.stepz: unknown key" in shown
    code, plain = in_terminal(["check", "r.yaml"], wrong, NO_COLOR="1")
    assert code == 2
    assert "\x1b" not in plain
    assert "stages.s.stepz: unknown key" in plain


@pytest.mark.parametrize("locale", ["C", "de_DE.ISO-8859-1"])
def test_a_locale_that_is_not_utf_8_gets_ascii(locale: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: Gr\xf6\xdfe\nstages: {}\n", encoding="utf-8")
    code, shown = in_terminal(["check", "r.yaml"], tmp_path, LC_ALL=locale)
    assert code == 2
    assert shown.isascii()
    assert "Gr\\xf6\\xdfe" in shown
    code, shown = in_terminal(["check", "r.yaml"], tmp_path, LC_ALL="C.UTF-8")
    assert "Gr\xf6\xdfe" in shown
