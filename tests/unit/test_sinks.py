"""Trackers get the metrics: read back from their own files, offline, over an interruption."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from align.core.log import MetricsLog
from align.core.sinks import TRL_NAMES, Tracking, trl_name

TRACKING = Tracking(
    project="paper",
    group="seeds",
    tags=["ablation"],
    config={"beta": 0.1, "optim": {"learning_rate": 1e-3}},
)
STEPS = [1, 2, 3, 4, 5]


def train(folder: Path, sink: str, tracking: Tracking = TRACKING) -> None:
    """Log five steps in two attempts: the second resumes at step 3, after step 4 was logged."""
    for first, last, rewind in ((1, 4, None), (4, 5, 3)):
        log = MetricsLog(folder, total_steps=5, sinks=[sink], tracking=tracking)
        if rewind is not None:
            log.rewind(rewind)
        for step in range(first, last + 1):
            sample = {"prompt": "2+2?", "completion": f"it is {step}", "score": 1.0}
            log.log(step, {"train/loss": 1 / step, "optim/grad_norm": 2.0}, sample=sample)
        log.close()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "quickstart" / "sft"


def test_mlflow_has_one_run_with_every_step(stage, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    train(stage, "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("paper")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "sft"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"beta": "0.1", "optim.learning_rate": "0.001"}
    assert (run.data.tags["group"], run.data.tags["ablation"]) == ("seeds", "true")
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")}
    assert history == pytest.approx({step: 1 / step for step in STEPS})


def test_wandb_offline_continues_one_run_with_a_table(stage, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra 'sinks' is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    given: list[dict[str, Any]] = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **keys: given.append(keys) or init(**keys))
    train(stage, "wandb")
    first, second = given
    assert first == second
    assert (first["project"], first["group"], first["name"]) == ("paper", "seeds", "sft")
    assert first["resume"] == "allow"
    files = sorted(stage.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{first['id']}"}
    text = b"".join(file.read_bytes() for file in files)
    for name in (b"train/loss", b"optim/grad_norm", b"ablation", b"learning_rate"):
        assert name in text
    assert list(stage.glob("wandb/offline-run-*/files/media/table/samples*.json"))


def test_swanlab_offline_writes_every_metric(stage, monkeypatch):
    swanlab = pytest.importorskip("swanlab", reason="swanlab is not installed")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    given: list[dict[str, Any]] = []
    init = swanlab.init
    monkeypatch.setattr(swanlab, "init", lambda **keys: given.append(keys) or init(**keys))
    train(stage, "swanlab")
    assert given[0] == given[1]
    files = [path for path in (stage / "swanlab").rglob("*") if path.is_file()]
    text = b"".join(path.read_bytes() for path in files)
    for name in (b"train/loss", b"optim/grad_norm", b"ablation"):
        assert name in text


def test_trackio_keeps_every_step_locally(stage, tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="the extra 'sinks' is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage

    train(stage, "trackio")
    (run,) = SQLiteStorage.get_runs("paper")
    rows = SQLiteStorage.get_logs("paper", run)
    found = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert found == pytest.approx({step: 1 / step for step in STEPS})


def test_names_of_trl_reach_the_tracker_and_files_keep_their_own(stage):
    pytest.importorskip("tensorboard", reason="the extra 'sinks' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(stage, "tensorboard", Tracking(names="trl"))
    found = EventAccumulator(str(stage / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "grad_norm"}
    assert [event.step for event in found.Scalars("loss")] == STEPS
    assert '"train/loss"' in (stage / "metrics.jsonl").read_text()


def test_names_are_those_that_trl_logs():
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    folder = Path(spec.origin).parent / "trainer"
    source = "".join((folder / f"{n}_trainer.py").read_text() for n in ("grpo", "dpo", "reward"))
    literals = set(re.findall(r'"([\w/]+)"', source))
    # Written by transformers' Trainer, or with a prefix for held-out rows.
    trainer = {"loss", "eval_loss", "grad_norm", "learning_rate"}
    for ours, theirs in TRL_NAMES.items():
        known = theirs in trainer or theirs.removeprefix("eval_") in literals
        assert known, f"{ours} -> {theirs}: no metric of TRL"


def test_mean_of_a_single_reward_has_trl_name_and_rates_have_not():
    assert trl_name("reward/math") == "rewards/math/mean"
    assert trl_name("reward/mean") == "reward"
    assert trl_name("reward/invalid_frac") == "reward/invalid_frac"
    assert trl_name("value/explained_variance") == "value/explained_variance"
