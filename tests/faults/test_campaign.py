"""A small part of the campaign of `make faults`, and its own tools."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.campaign import damages, forked
from tests.faults.campaign.catalogue import catalogue
from tests.faults.campaign.ledger import (
    Failed,
    Outcome,
    Unclear,
    append,
    left_to_try,
    read,
    refused,
    table,
)

ROOT = Path(__file__).resolve().parents[2]


def test_a_small_part_of_the_campaign_holds() -> None:
    command = [sys.executable, "-m", "tests.faults.campaign", "--quick", "--seed", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    expected = len(catalogue(quick=True))
    assert re.search(rf"^\| all \| {expected} \| {expected} \| 0 \| 0 \|$", done.stdout, re.M)


def test_the_whole_campaign_has_a_thousand_faults_and_250_kills_of_every_kind_of_stage() -> None:
    from align.recipe.schema import STAGES
    from tests.faults.campaign.recipe import KINDS, kind_of

    keys = [fault.key for fault in catalogue(quick=False)]
    assert len(set(keys)) == len(keys) >= 1000
    kills = [key for key in keys if key.startswith("kill -9")]
    assert len(kills) >= 250
    killed = {kind_of(stage) for stage in KINDS if any(f", {stage}/" in key for key in kills)}
    # An encoder is only copied, and an evaluation starts over: tests/faults/test_signals.py.
    assert killed == set(STAGES) - {"encoder", "evaluate"}


@pytest.mark.parametrize("name", damages.DAMAGES)
def test_every_damage_changes_the_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"something else")
    for content in (b"", b"null", b"[]\n", bytes(700)):
        path = tmp_path / "file"
        path.write_bytes(content)
        damages.damage(name, path, random.Random(0))
        assert not path.is_file() or path.read_bytes() != content
        damages.remove(path)


def outcome(kind: str, *, result: str = "held", seed: int = 0, commit: str = "a") -> Outcome:
    return Outcome(kind, "x", result, "", 0.0, seed, commit)


def test_a_file_of_outcomes_has_the_last_one_of_each_fault_and_seed(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    assert read(path, 0) == {}
    first, other, again = outcome("a", result="failed"), outcome("b"), outcome("a", commit="b")
    for found in (first, other, outcome("a", seed=7, result="unclear"), again):
        append(found, path)
    assert read(path, 0) == {"a/x": again, "b/x": other}
    assert [o.result for o in read(path, 7).values()] == ["unclear"]


def test_a_second_call_with_the_same_file_tries_only_what_is_left(tmp_path: Path) -> None:
    """Two faults in the file as held and failed: the failed one alone is tried again."""
    chosen = catalogue(quick=True)[:2]
    path = tmp_path / "faults.jsonl"
    for fault, result in zip(chosen, ("held", "failed"), strict=True):
        append(Outcome(fault.kind, fault.name, result, "", 0.0, 0, "before"), path)
    left = left_to_try(chosen, read(path, 0))
    assert [chosen[i].key for i in left] == [chosen[1].key]
    assert left_to_try(chosen, {}) == [0, 1]


def test_the_table_counts_each_outcome_once() -> None:
    found = [("a", "held"), ("b", "failed"), ("a", "unclear"), ("a", "held")]
    lines = table(outcome(kind, result=result) for kind, result in found).splitlines()
    assert lines[2:] == [
        "| a | 3 | 2 | 0 | 1 |",
        "| b | 1 | 0 | 1 | 0 |",
        "| all | 4 | 2 | 1 | 1 |",
    ]


def test_a_run_that_is_killed_before_it_says_a_word_has_an_empty_log(tmp_path: Path) -> None:
    run = forked.start(lambda: time.sleep(120), tmp_path)
    assert run.log.is_file()  # whether or not the rank came so far
    run.kill()
    assert run.wait() == [-signal.SIGKILL]
    assert run.said() == ""


@pytest.mark.parametrize(
    ("code", "said", "raised"),
    [
        (2, "x.jsonl:3: no content", None),
        (0, "fine", Failed),
        (1, "x.jsonl:3: no content", Failed),
        (2, "Traceback (most recent call last):\n x.jsonl", Unclear),
        (2, "something is wrong", Unclear),
    ],
)
def test_a_refusal_has_its_exit_code_its_place_and_no_traceback(code, said, raised) -> None:
    if raised is None:
        refused(code, said, names="x.jsonl")
        return
    with pytest.raises(raised):
        refused(code, said, names="x.jsonl")
