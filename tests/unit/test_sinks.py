"""Trackers get the metrics: read back from their own files, offline, over an interruption."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from align.core.log import MetricsLog
from align.core.sinks import TRL_NAMES, TRL_NAMES_OF_KIND, Tracking, open_sink, trl_name

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
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # The variable is read when the package is imported, which another library may have done.
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    pytest.importorskip("trackio", reason="the extra 'sinks' is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    train(stage, "trackio")
    (run,) = SQLiteStorage.get_runs("paper")
    assert SQLiteStorage.get_run_config("paper", run)["tags"] == ["ablation"]
    rows = SQLiteStorage.get_logs("paper", run)
    found = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert found == pytest.approx({step: 1 / step for step in STEPS})
    # The stage of another run is another run of the project.
    train(stage.parents[1] / "other" / "sft", "trackio")
    assert len(SQLiteStorage.get_runs("paper")) == 2


@pytest.mark.parametrize(
    ("tracker", "key"), [("wandb", "id"), ("swanlab", "id"), ("trackio", "name")]
)
def test_stages_of_one_name_are_different_runs_and_keep_their_tags(
    tracker: str, key: str, stage: Path, monkeypatch: pytest.MonkeyPatch
):
    given: list[dict[str, Any]] = []
    client = ModuleType(tracker)
    vars(client).update(init=lambda **keys: given.append(keys), Table=None)
    monkeypatch.setitem(sys.modules, tracker, client)
    for folder in (stage, stage, stage.parents[1] / "other" / "sft"):
        open_sink(tracker, folder, TRACKING)
    first, again, other = given
    # By this key a client finds the run that it continues.
    assert first[key] == again[key] != other[key]
    assert {x["project"] for x in given} == {"paper"}
    assert first.get("tags", first["config"].get("tags")) == ["ablation"]


def test_names_of_trl_reach_the_tracker_and_files_keep_their_own(stage):
    pytest.importorskip("tensorboard", reason="the extra 'sinks' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(stage, "tensorboard", Tracking(names="trl"))
    found = EventAccumulator(str(stage / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "grad_norm"}
    assert [event.step for event in found.Scalars("loss")] == STEPS
    assert '"train/loss"' in (stage / "metrics.jsonl").read_text()


def trainer_source(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    return (Path(spec.origin).parent / "trainer" / f"{name}_trainer.py").read_text()


def test_names_are_those_that_trl_logs():
    source = "".join(trainer_source(name) for name in ("grpo", "dpo"))
    # Written by transformers' Trainer, or with a prefix for held-out rows.
    trainer = {"loss", "eval_loss", "grad_norm", "learning_rate"}
    for ours, theirs in TRL_NAMES.items():
        known = theirs in trainer or f'"{theirs}"' in source
        assert known, f"{ours} -> {theirs}: no metric of TRL"
    for kind, names in TRL_NAMES_OF_KIND.items():
        source = trainer_source(kind)
        for ours, theirs in names.items():
            # Some are written with a prefix for training or held-out rows.
            assert f'["{theirs}"]' in source, f"{kind}: {ours} -> {theirs}: no metric of TRL"


def test_names_of_trl_mean_what_they_mean_there():
    # TRL's kl is exp(r) - r - 1 of r = log(reference / policy), our k3; kl/reference is k1.
    source = trainer_source("grpo")
    ratio = r"\(ref_per_token_logps - per_token_logps\)"
    assert re.search(rf"per_token_kl = \(\s*torch\.exp{ratio} - {ratio} - 1\s*\)", source)
    assert trl_name("kl/reference_k3") == "kl"
    assert trl_name("kl/reference") == "kl/reference"
    # Its num_tokens counts since the beginning, tokens/sampled those of one step.
    assert '["num_tokens"] = [self.state.num_input_tokens_seen]' in source
    assert trl_name("tokens/sampled") == "tokens/sampled"
    # The same metric has a name in each trainer, and none in a stage that TRL has not.
    told = {kind: trl_name("train/accuracy", kind) for kind in ("dpo", "reward", "classify")}
    assert told == {"dpo": "rewards/accuracies", "reward": "accuracy", "classify": "train/accuracy"}
    assert trl_name("eval/margin", "reward") == "eval_margin"
    assert trl_name("train/kl", "kto") == "kl"


def test_trackers_get_the_names_of_the_stage_kind(stage, monkeypatch):
    logged: list[str] = []

    class Client:
        def log(self, metrics: dict[str, float], step: int) -> None:
            logged.extend(metrics)

        def finish(self) -> None: ...

    client = ModuleType("swanlab")
    vars(client).update(init=lambda **keys: Client())
    monkeypatch.setitem(sys.modules, "swanlab", client)
    tracking = Tracking(names="trl", config={"kind": "reward"})
    log = MetricsLog(stage, total_steps=1, sinks=["swanlab"], tracking=tracking)
    log.log(1, {"train/accuracy": 0.5})
    log.close()
    assert "accuracy" in logged


def test_mean_of_a_single_reward_has_trl_name_and_rates_have_not():
    assert trl_name("reward/math") == "rewards/math/mean"
    assert trl_name("reward/mean") == "reward"
    assert trl_name("reward/invalid_frac") == "reward/invalid_frac"
    assert trl_name("value/explained_variance") == "value/explained_variance"
