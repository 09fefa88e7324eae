"""A stage that was killed after its last step: every rank gets the numbers of that step."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from online_parts import grpo_spec, run_of
from played_ranks import play

from align.core.log import METRICS_FILE, MetricsLog
from align.core.types import TokenRow
from align.online import loop
from align.training import offline
from align.training.heldout import HeldOut
from align.training.offline import OfflineSchedule, OfflineTask, train_offline

STEPS = 2
LAST = {"train/loss": 2.5, "eval/loss": 1.25}
ROWS = [TokenRow((1, 2, i), (False, False, True)) for i in range(4)]
SCHEDULE = OfflineSchedule(
    total_steps=STEPS,
    batch_size=2,
    micro_tokens=64,
    eval_every=0,
    checkpoint_every=0,
    keep_checkpoints=1,
    seed=0,
)


def log_of(folder: Path, rank: int) -> MetricsLog:
    return MetricsLog(folder, total_steps=STEPS, rank=rank)


def write_last(folder: Path, numbers: dict[str, float | None]) -> None:
    line = json.dumps({"step": STEPS, "time_s": 1.0, **numbers})
    (folder / METRICS_FILE).write_text(line + "\n", encoding="utf-8")


def resumes(monkeypatch: pytest.MonkeyPatch, module: Any, state: dict[str, Any]) -> None:
    """Let a loop find a checkpoint of its last step."""
    monkeypatch.setattr(module, "newest_checkpoint", lambda _: Path("step-00000002"))
    monkeypatch.setattr(module, "load_checkpoint", lambda *_: (STEPS, state))


def end_offline(folder: Path, rank: int) -> dict[str, float]:
    """Resume an offline stage that has no step left."""
    learner: Any = SimpleNamespace(engine=None, steps=0)
    task = OfflineTask(ROWS, ROWS, lambda row: 3, lambda *_: None, lambda *_: None)  # type: ignore
    return train_offline(
        learner, task, SCHEDULE, metrics=log_of(folder, rank), checkpoints=folder / "checkpoints"
    )


def test_offline_ranks_get_the_last_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_last(tmp_path, LAST)
    resumes(monkeypatch, offline, {"heldout": {"first": {"loss": [1.5]}}})
    found = play(monkeypatch, 2, lambda rank: end_offline(tmp_path, rank))
    assert found == [LAST, LAST]


def test_online_ranks_get_the_last_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = grpo_spec(steps=STEPS)
    state = {"kl": {"coef": 0.1}, "policy_steps": 2, "diagnosis": {}}
    resumes(monkeypatch, loop, state)
    monkeypatch.setattr(loop.Diagnosis, "load_state_dict", lambda *_: None)
    numbers = {"reward/mean": 0.5, "kl/reference": None}
    write_last(tmp_path, numbers)

    def end_online(rank: int) -> dict[str, float]:
        policy: Any = SimpleNamespace(engine=None, steps=0, num_trained=1)
        run = run_of(spec, policy)
        return loop.train_online(run, metrics=log_of(tmp_path, rank), checkpoints=tmp_path)

    for found in play(monkeypatch, 2, end_online):
        assert found["reward/mean"] == 0.5
        # A number that was not finite is null in the file, and a number again here.
        assert math.isnan(found["kl/reference"])


def test_lost_log_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumes(monkeypatch, offline, {"heldout": {"first": {"loss": [1.5]}}})
    monkeypatch.setattr(HeldOut, "look", lambda *_: {"eval/loss": 1.25})
    assert end_offline(tmp_path, 0) == {"eval/loss": 1.25}
