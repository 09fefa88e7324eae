"""A run that is stopped and resumed in the browser's pages ends with the bytes of a whole one."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import stage_runs as runs

from align.core.errors import EXIT_PREEMPTED
from tests.moments import wait_at
from tests.serve.running import running

RECIPE = f"""\
name: tiny
seed: 3
stages:
{runs.BASE}
  sft:
    kind: sft
    init: base
    data: [{{world: sft, rows: 64, split: train}}]
    steps: 12
    batch_size: 8
    micro_tokens: 256
    checkpoint_every: 3
    optim: {{learning_rate: 1.0e-3}}
"""


def wait_until(seen: Callable[[], bool]) -> None:
    limit = time.monotonic() + runs.LIMIT_S
    while not seen():
        assert time.monotonic() < limit, "what was waited for did not come"
        time.sleep(0.05)


def num_steps(run: Path) -> int:
    try:
        return (run / "sft" / "metrics.jsonl").read_text().count("\n")
    except OSError:
        return 0


def start(recipe: Path, folder: Path, **more: str) -> "subprocess.Popen[bytes]":
    argv = [sys.executable, "-m", "align", "run", str(recipe), "--runs", str(folder)]
    return subprocess.Popen(argv, env=runs.environment() | more, start_new_session=True)


@pytest.mark.slow
def test_stopped_and_resumed_in_pages_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)
    whole = start(recipe, tmp_path / "whole")
    assert whole.wait(runs.LIMIT_S) == 0
    # The server's child gets the same environment as `align run`.
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "runs"
    run = folder / "tiny"
    with running(folder) as server, server.browser() as browser:
        form = {"csrf": server.csrf(browser)}

        def state() -> str:
            return browser.get("/runs/tiny/parts/status").text

        # It waits for the signal as it saves its first checkpoint.
        waits = tmp_path / "waits"
        process = start(recipe, folder, **wait_at("sft/" + runs.half_of(3), waits))
        wait_until(waits.exists)
        assert ">running<" in state()
        assert browser.post("/runs/tiny/stop", data=form).status_code == 303
        assert process.wait(runs.LIMIT_S) == EXIT_PREEMPTED
        stopped = num_steps(run)
        assert 3 <= stopped < 12
        assert ">stopped<" in state()
        assert browser.post("/runs/tiny/resume", data=form).status_code == 303
        wait_until(lambda: ">done<" in state() or "Resuming failed" in state())
        assert "Resuming failed" not in state()
    found, expected = run, tmp_path / "whole" / "tiny"
    assert runs.weights(found, "sft") == runs.weights(expected, "sft")
    assert runs.numbers(found, "sft") == runs.numbers(expected, "sft")
    log = (run / "sft" / "log.txt").read_text()
    assert "resumed from" in log
    saved = json.loads((run / "sft" / "metrics.jsonl").read_text().splitlines()[stopped])
    assert saved["step"] == stopped + 1
