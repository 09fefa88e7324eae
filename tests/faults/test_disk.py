"""A disk that fills up while weights are saved: the stage says so, waits, goes on or ends whole."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerState,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "numeric"))
from alone import world_of_one

from align.core import checkpoints, distributed, storage
from align.core.errors import Preempted
from align.preflight import disk
from align.preflight.disk import bytes_to_write, checkpoint_bytes, room
from align.recipe.schema import OptimSpec, SftStage, TrlStage, ZeroSpec
from align.stages.trl import saving
from align.stages.trl.saving import HASHES, save_patiently
from align.stages.trl.stage import Watcher
from align.stages.trl.trainers import _own_arguments

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
OTHERS = [
    OSError(errno.EROFS, os.strerror(errno.EROFS)),
    OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
    RuntimeError("a loss is nan"),
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "POLL_S", 0.001)
    monkeypatch.setenv("ALIGN_DISK_WAIT_S", "120")
    monkeypatch.setattr(logging.getLogger("align"), "propagate", True)


class Disk:
    """A torch writer on a disk that is full for its first ``failures`` files."""

    def __init__(self, failures: int, error: Exception = FULL) -> None:
        self.failures, self.error, self.written = failures, error, 0

    def save(self, state: object, path: str) -> None:
        if self.failures:
            self.failures -= 1
            Path(path).write_bytes(b"half")
            raise self.error
        torch.save(state, path)
        self.written += 1


def engine_on(disk: Disk) -> SimpleNamespace:
    def save_checkpoint(folder: str, *, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir(exist_ok=True)
        engine.checkpoint_engine.save({"w": torch.ones(2**18)}, f"{folder}/{tag}/model.pt")

    engine = SimpleNamespace(checkpoint_engine=disk, save_checkpoint=save_checkpoint)
    return engine


def save(folder: Path, step: int, disk: Disk) -> Path:
    engines = {"policy": engine_on(disk)}
    return checkpoints.save_checkpoint(folder, step, engines=engines, state={}, keep=2)


def test_what_killed_savings_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """With checkpoint_every: auto, step 3 is not saved again: its 1 GB would stay for ever."""
    kept = save(tmp_path, 2, Disk(0))
    left = [tmp_path / f"step-{step:08d}.tmp" for step in (3, 5)]
    for folder in left:
        (folder / "policy").mkdir(parents=True)
        (folder / "policy" / "model.pt").write_bytes(b"half")
    newest = save(tmp_path, 4, Disk(0))
    assert sorted(tmp_path.iterdir()) == [kept, newest]
    # The same of a TRL trainer, whose checkpoints are complete with their record.
    whole, half = (tmp_path / f"checkpoint-{step}" for step in (7, 9))
    for folder in (whole, half):
        folder.mkdir()
    (whole / HASHES).write_text("{}")
    saving._begin(tmp_path / "checkpoint-10")
    assert sorted(tmp_path.glob("checkpoint-*")) == [whole]


@pytest.mark.parametrize(
    "error",
    [FULL, RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")],
)
def test_a_checkpoint_is_complete_once_there_is_room(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = save(tmp_path, 3, Disk(2, error))
    assert checkpoints.damage(found) is None
    assert torch.load(found / "policy" / "model.pt")["w"].sum() == 2**18
    (line,) = [r.getMessage() for r in caplog.records if "no space left on" in r.getMessage()]
    assert "needs about 1 MiB" in line
    assert "MiB free" in line


def test_without_room_the_wait_ends_and_the_last_checkpoint_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(tmp_path, 3, Disk(0))
    monkeypatch.setenv("ALIGN_DISK_WAIT_S", "0")
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 4, Disk(10**9))
    assert not (tmp_path / "step-00000004.tmp" / "policy" / "model.pt").exists()
    assert checkpoints.newest_checkpoint(tmp_path) == before
    # The half-written folder does not stand in the way of the next one.
    assert checkpoints.damage(save(tmp_path, 4, Disk(0))) is None


def test_a_signal_ends_the_wait_with_75(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(tmp_path, 3, Disk(0))
    monkeypatch.setattr(distributed, "_asked", True)
    with pytest.raises(Preempted, match="waiting for space") as told:
        save(tmp_path, 4, Disk(10**9))
    assert told.value.exit_code == 75
    assert checkpoints.newest_checkpoint(tmp_path) == before


@pytest.mark.parametrize("error", OTHERS)
def test_nothing_waits_for_an_error_that_space_does_not_mend(
    error: Exception, tmp_path: Path
) -> None:
    disk = Disk(1, error)
    with pytest.raises(type(error)):
        save(tmp_path, 3, disk)
    assert disk.failures == 0
    assert disk.written == 0


def stage(**settings: object) -> SftStage:
    given = {"kind": "sft", "init": "base", "data": [{"world": "sft"}], **settings}
    return SftStage.model_validate(given)


def test_the_preflight_counts_weights_optimizer_and_checkpoints() -> None:
    # By hand, 1000 weights of which 100 are trained: 4 x 1000 + 8 x 100 = 4800 in float32;
    # 2 x 1000 + (8 + 4) x 100 = 3200 in bfloat16, whose optimizer has float32 copies.
    assert checkpoint_bytes(stage(), 100, 1000) == 4800
    assert checkpoint_bytes(stage(dtype="bfloat16"), 100, 1000) == 3200
    # None kept: one checkpoint on a signal. Two kept: three at the moment of the third.
    assert bytes_to_write(stage(checkpoint_every=0), 100, 1000) == (4800 + 4000, 4800, 1)
    assert bytes_to_write(stage(), 100, 1000) == (3 * 4800 + 4000, 4800, 3)
    kept = stage(checkpoint_every=5, keep_checkpoints=2)
    assert bytes_to_write(kept, 100, 1000) == (3 * 4800 + 4000, 4800, 3)


def test_a_device_with_less_room_than_the_stage_writes_is_refused(tmp_path: Path) -> None:
    fits, huge = (
        room(stage(checkpoint_every=0), 10, 10, folder=tmp_path),
        room(stage(), 10**15, 10**15, folder=tmp_path),
    )
    assert (fits.verdict, huge.verdict) == ("ok", "fail")
    assert "1 checkpoint of 1 MiB" in fits.value
    assert "MiB free" in huge.bound
    assert "no space left on " in huge.remedy


@pytest.mark.parametrize(
    ("free", "every", "verdict"),
    # A checkpoint of 10^6 float32 weights, of which none is trained, and the model: 4 MB each.
    [
        (16_000_000, "auto", "ok"),
        (15_000_000, "auto", "warn"),
        (15_000_000, 5, "fail"),
        (7_000_000, "auto", "fail"),
        (8_000_000, 0, "ok"),
    ],
)
def test_room_for_one_checkpoint_by_time_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, every: object, verdict: str
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: free)
    found = room(stage(checkpoint_every=every), 0, 10**6, folder=tmp_path)
    assert found.verdict == verdict


@pytest.fixture
def alone() -> Iterator[None]:
    with world_of_one():
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_the_size_of_a_checkpoint_that_deepspeed_saves(
    dtype: str, tmp_path: Path, alone: None
) -> None:
    from align.training.learner import Learner

    module = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False), torch.nn.Linear(512, 512))
    module[0].requires_grad_(False)
    trained, total = 512 * 512 + 512, 2 * 512 * 512 + 512
    learner = Learner(
        module.to(getattr(torch, dtype)),
        optim=OptimSpec(),
        zero=ZeroSpec(),
        dtype=dtype,
        total_steps=2,
    )

    def loss(model: torch.nn.Module, x: torch.Tensor):
        return model(x).float().pow(2).mean(), {}

    learner.step([torch.ones(4, 512, dtype=getattr(torch, dtype))], loss)
    engines = {"policy": learner.engine}
    found = checkpoints.save_checkpoint(tmp_path, 1, engines=engines, state={}, keep=1)
    size = sum(p.stat().st_size for p in found.rglob("*") if p.is_file())
    assert size == pytest.approx(checkpoint_bytes(stage(dtype=dtype), trained, total), rel=0.02)


def trained_by_trl(stage: Path, monkeypatch: pytest.MonkeyPatch, failures: int = 0) -> Path:
    """Train two steps with a checkpoint after each; return the folder of the checkpoints.

    Args:
        stage: folder of the stage.
        monkeypatch: patches the writers.
        failures: how often each writer finds a full disk, for each of its files.
    """
    spec = TrlStage.model_validate(
        {
            **{"kind": "trl", "trainer": "SFT", "rows": "sft", "init": "base"},
            **{"data": [{"world": "sft"}], "steps": 2, "batch_size": 2, "micro_batch_size": 2},
            **{"checkpoint_every": 1, "keep_checkpoints": 1},
        }
    )
    checkpoints = stage / "checkpoints"
    given = _own_arguments(spec, SimpleNamespace(out=stage, seed=0))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    trainer = Trainer(
        Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=1, num_key_value_heads=1)),
        TrainingArguments(**given),
        train_dataset=[{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4,
    )
    metrics = SimpleNamespace(log=lambda *_: None)
    trainer.add_callback(Watcher(metrics, checkpoints, period=1, keep=spec.keep_checkpoints))
    save_patiently(trainer, checkpoints)
    stage.mkdir(exist_ok=True)
    left: dict[str, int] = {}

    def full(write: Callable[..., object]) -> Callable[..., object]:
        def written(*args: Any, **options: Any) -> object:
            name = str(next(a for a in (*args[::-1], *options.values()) if isinstance(a, str)))
            left[name] = left.get(name, failures) - 1
            if left[name] >= 0:
                raise FULL
            return write(*args, **options)

        return written

    monkeypatch.setattr(torch, "save", full(torch.save))
    monkeypatch.setattr(TrainerState, "save_to_json", full(TrainerState.save_to_json))
    trainer.train()
    monkeypatch.undo()
    assert left
    assert max(left.values()) < 0
    return checkpoints


def test_a_trl_checkpoint_waits_for_space_and_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = trained_by_trl(tmp_path / "a", monkeypatch).iterdir()
    monkeypatch.setattr(storage, "POLL_S", 0.001)
    (found,) = trained_by_trl(tmp_path / "b", monkeypatch, failures=2).iterdir()
    assert first.name == found.name == "checkpoint-2"
    assert checkpoints.damage(found, record=HASHES) is None
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        assert (found / name).read_bytes() == (first / name).read_bytes(), name


def test_what_is_left_of_a_trl_checkpoint_is_no_part_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that was damaged is saved anew into a folder with an old record in it."""
    old = tmp_path / "a" / "checkpoints" / "checkpoint-2"
    old.mkdir(parents=True)
    (old / HASHES).write_text("{}")
    (old / "global_step2").mkdir()
    (found,) = trained_by_trl(tmp_path / "a", monkeypatch).iterdir()
    assert checkpoints.damage(found, record=HASHES) is None
    assert not (found / "global_step2").exists()


def test_an_older_trl_checkpoint_is_there_until_the_new_one_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def record(folder: Path, name: str, state: dict) -> None:
        seen.append(sorted(p.name for p in folder.parent.iterdir()))
        checkpoints.write_record(folder, name, state)

    monkeypatch.setattr(saving, "write_record", record)
    trained_by_trl(tmp_path / "a", monkeypatch)
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
