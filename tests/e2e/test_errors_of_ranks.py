"""An error in a stage of two ranks is shown once, in the terminal, with its place."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 3600
RECIPE = """\
name: tiny
stages:
  base:
    kind: base
    build: {vocab_size: 320, hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1,
            intermediate_size: 64, max_positions: 256}
    tokenizer: {chat_template: plain}
    data: [{world: corpus, rows: 40}]
    steps: 1
    batch_size: 8
    max_length: 256
  rows:
    {kind: sft, init: base, ranks: 2, steps: 1, batch_size: 4, max_length: 128,
     data: [{path: rows.jsonl}]}
  memory:
    {kind: sft, init: base, ranks: 2, steps: 1, batch_size: 4, max_length: 128,
     data: [{world: sft, rows: 40}], loss: "own.py:loss"}
  layers:
    {kind: sft, init: base, ranks: 2, steps: 1, batch_size: 4, max_length: 128,
     data: [{world: sft, rows: 40}], tuning: {method: lora, targets: [no_such_layer]}}
"""
PLACES = {
    "rows": ("14:20", "data: [{path: rows.jsonl}]}"),
    "layers": ("20:70", "data: [{world: sft, rows: 40}], tuning: {"),
}
"""Line and column of the value that each error is about, and the start of its line."""
OWN = """\
import torch


def loss(*args, **keys):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the recipe, rows of which the 21st is wrong, and a finished base."""
    place = tmp_path_factory.mktemp("errors")
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}."} for i in range(40)]
    rows[20]["completion"] = 20  # pyright: ignore[reportArgumentType]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "own.py").write_text(OWN)
    (place / "my.yaml").write_text(RECIPE)
    code, text = align_run(place, "base")
    assert code == 0, text
    return place


def align_run(folder: Path, stage: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "align", "run", "my.yaml", "--only", stage],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("stage", "expected", "told"),
    [
        ("rows", 2, "rows.jsonl:21: completion: expected text or a list of turns, found 20"),
        ("memory", 1, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
        ("layers", 2, "tuning.targets: 'no_such_layer' names no layer of its own, expected"),
    ],
)
def test_an_error_of_both_ranks_is_shown_once(
    folder: Path, stage: str, expected: int, told: str
) -> None:
    code, text = align_run(folder, stage)
    assert code == expected, text
    assert text.count(told) == 1, text
    assert "Traceback" not in text
    assert "rank 1" not in text
    # The launcher may end the second rank before that has logged the error too.
    assert told in (folder / "runs" / "tiny" / stage / "log.txt").read_text()
    if stage == "memory":
        assert "lower micro_tokens" in text
    if stage in PLACES:  # as align check shows it: the place, the line, and a caret
        place, shown = PLACES[stage]
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if told in line)
        assert lines[at].startswith(f"    my.yaml:{place}: stages.{stage}.")
        assert lines[at + 1].strip().startswith(shown)
        # Behind the indentation of the message and of the line.
        assert lines[at + 2] == " " * (8 + int(place.partition(":")[2]) - 1) + "^"
    listed = subprocess.run(
        [sys.executable, "-m", "align", "runs"], cwd=folder, capture_output=True, check=True
    ).stdout.decode()
    assert f"failed in {stage}, " in listed
    assert told[:100] in listed
