"""checkpoint_every: auto saves by time, and when it saves changes nothing else."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import curves
from online_parts import policy_of

from align.core import checkpoints
from align.core.checkpoints import CheckpointTimer
from align.core.log import MetricsLog
from align.stages import sft
from align.training.offline import OfflineSchedule, train_offline
from align.training.task import OfflineTask


class Clock:
    """A clock that moves when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(checkpoints, "CLOCK", found)
    return found


def due_after(timer: CheckpointTimer, clock: Clock, seconds: float) -> bool:
    clock.now += seconds
    return timer.due(1)


def test_auto_saves_after_ten_minutes_and_not_before(clock: Clock) -> None:
    timer = CheckpointTimer("auto")
    assert not due_after(timer, clock, 599.0)
    assert due_after(timer, clock, 1.0)
    with timer.saving():
        clock.now += 2.0
    # Ten minutes from the end of the last one: a save of 2 s is cheap.
    assert not due_after(timer, clock, 599.0)
    assert due_after(timer, clock, 1.0)


@pytest.mark.parametrize(("took", "wait"), [(19.0, 600.0), (40.0, 1200.0), (90.0, 1800.0)])
def test_slow_saves_are_rarer_but_never_beyond_half_an_hour(
    clock: Clock, took: float, wait: float
) -> None:
    timer = CheckpointTimer("auto")
    with timer.saving():
        clock.now += took
    assert not due_after(timer, clock, wait - 1.0)
    assert due_after(timer, clock, 1.0)


def test_numbers_count_steps_and_zero_is_never(clock: Clock) -> None:
    clock.now = 1e6
    assert [s for s in range(1, 10) if CheckpointTimer(4).due(s)] == [4, 8]
    assert not any(CheckpointTimer(0).due(s) for s in range(1, 10))


def train(model_dir: Path, folder: Path, clock: Clock, *, step_s: float) -> dict[str, torch.Tensor]:
    """Train 6 steps of ``step_s`` seconds each with ``auto``; return the weights."""
    torch.manual_seed(11)
    learner = policy_of(model_dir)
    step = learner.step

    def timed(*args: Any) -> dict[str, float]:
        clock.now += step_s
        return step(*args)

    learner.step = timed
    rows = [pair.chosen for pair in curves.pairs()]
    folder.mkdir(exist_ok=True)
    metrics = MetricsLog(folder, total_steps=6)
    train_offline(
        learner,
        OfflineTask(rows, rows[:9], sft.length_of, sft.collate, sft.sft_loss),
        OfflineSchedule(6, 8, 60, 2, "auto", 9, seed=2),
        metrics=metrics,
        checkpoints=folder / "checkpoints",
    )
    metrics.close()
    return {name: p.detach().clone() for name, p in learner.module.named_parameters()}


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_short_run_saves_nothing_and_a_long_one_resumes_from_any_moment(
    model_dir: Path, tmp_path: Path, clock: Clock
) -> None:
    expected = train(model_dir, tmp_path / "short", clock, step_s=50.0)
    assert saved(tmp_path / "short") == []
    # Steps of 250 s: 750 s after step 3, and again after step 6.
    long = train(model_dir, tmp_path / "long", clock, step_s=250.0)
    assert saved(tmp_path / "long") == [3, 6]
    assert all(torch.equal(long[name], expected[name]) for name in expected)
    # Resumed from step 3, with other moments: the same bytes and the same lines.
    lines = (tmp_path / "long" / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(tmp_path / "long" / "checkpoints" / "step-00000006")
    again = train(model_dir, tmp_path / "long", clock, step_s=700.0)
    assert saved(tmp_path / "long") == [3, 4, 5, 6]
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    after = (tmp_path / "long" / "metrics.jsonl").read_text().splitlines()
    timed = ("time_s", "tokens/per_s")
    assert [{k: v for k, v in json.loads(x).items() if k not in timed} for x in after] == [
        {k: v for k, v in json.loads(x).items() if k not in timed} for x in lines
    ]
