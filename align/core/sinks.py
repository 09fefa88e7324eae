"""Experiment trackers to which metrics are mirrored: TensorBoard, W&B, Trackio, MLflow, SwanLab."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from align.core.errors import RecipeError

MAX_SAMPLES = 200
"""Rows of the table of samples that W&B gets."""
TRL_NAMES = {
    "eval/loss": "eval_loss",
    "kl/reference_k3": "kl",
    "length/mean": "completions/mean_length",
    "length/truncated_frac": "completions/clipped_ratio",
    "optim/grad_norm": "grad_norm",
    "optim/learning_rate": "learning_rate",
    "policy/clip_frac": "clip_ratio/region_mean",
    "policy/entropy": "entropy",
    "policy/grad_norm": "grad_norm",
    "policy/learning_rate": "learning_rate",
    "policy/loss": "loss",
    "reward/dead_group_frac": "frac_reward_zero_std",
    "reward/mean": "reward",
    "reward/std": "reward_std",
    "sampler/importance_weight": "sampling/importance_sampling_ratio/mean",
    "sampler/logprob_gap": "sampling/sampling_logp_difference/mean",
    "time/step_s": "step_time",
    "train/loss": "loss",
}
"""Metric -> TRL's name for it. Means of single rewards become ``rewards/NAME/mean``."""
TRL_NAMES_OF_KIND = {
    "dpo": {
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_logprob": "logps/chosen",
    },
    "kto": {"kl": "kl", "good_reward": "rewards/chosen", "bad_reward": "rewards/rejected"},
    "reward": {"accuracy": "accuracy", "margin": "margin"},
}
"""Stage kind -> metric after ``train/`` -> the name in that trainer of TRL; ``eval_`` held out."""
_REWARD_METRICS = ("invalid_frac", "disagreement")


@dataclass(frozen=True, slots=True)
class Tracking:
    """How a stage appears in trackers.

    Attributes:
        project: project of the tracker; None uses the name of the run's folder.
        group: group of runs; None uses the name of the run's folder.
        tags: tags of the run. config: settings of the stage.
        names: ``trl`` logs metrics under TRL's names.
    """

    project: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    names: Literal["align", "trl"] = "align"


class Sink(Protocol):
    """A further target for metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        ...

    def sample(self, row: Mapping[str, Any]) -> None:
        """Record a sampled response, if the target has tables."""
        ...

    def rewind(self, step: int) -> None:
        """Remove everything after a step, as far as the target supports it."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


def trl_name(name: str, kind: str = "") -> str:
    """Return TRL's name of a metric, or the metric's own where TRL has none.

    Args:
        name: the metric. kind: kind of the stage, whose trainer may have a name of its own.
    """
    if name in TRL_NAMES:
        return TRL_NAMES[name]
    group, _, rest = name.partition("/")
    if group in ("train", "eval") and rest in (own := TRL_NAMES_OF_KIND.get(kind, {})):
        return own[rest] if group == "train" else f"eval_{own[rest]}"
    single = group == "reward" and "/" not in rest and rest not in _REWARD_METRICS
    return f"rewards/{rest}/mean" if single else name


def open_sink(name: str, directory: Path, tracking: Tracking) -> Sink:
    """Open a sink by name for a stage's folder.

    Raises:
        RecipeError: the name is unknown or the package is not installed.
    """
    if name not in _OPEN:
        raise RecipeError(f"sinks: unknown sink '{name}'; expected {', '.join(_OPEN)}")
    try:
        return _OPEN[name](directory, tracking)
    except ImportError as e:
        raise RecipeError(
            f"sinks.{name}: true, but the package '{name}' cannot be imported ({e}). "
            f"Run 'pip install {name}' or set sinks.{name}: false."
        ) from e


class TensorboardSink:
    """Write metrics to event files under ``tensorboard/`` in the stage's folder."""

    def __init__(self, directory: Path, tracking: Tracking) -> None:
        # Names in protobuf modules are created at import, invisible to a type checker.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        events, summaries = vars(event_pb2), vars(summary_pb2)
        self._event, self._session = events["Event"], events["SessionLog"]
        self._summary = summaries["Summary"]
        self._writer = EventFileWriter(str(directory / "tensorboard"))
        del tracking  # event files have neither project nor settings

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        values = [self._summary.Value(tag=n, simple_value=v) for n, v in metrics.items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))

    def sample(self, row: Mapping[str, Any]) -> None:
        """Do nothing: samples are in samples.jsonl."""

    def rewind(self, step: int) -> None:
        """Make TensorBoard hide what earlier processes wrote after this step."""
        start = self._session(status=self._session.START)
        event = self._event(step=step + 1, wall_time=time.time(), session_log=start)
        self._writer.add_event(event)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class RunSink:
    """Write metrics to an open W&B, Trackio or SwanLab run.

    A resumed stage continues its run and repeats the steps after its checkpoint, which have the
    same values.

    Args:
        run: the client's run.
        table: returns the client's table of column names and rows; None without tables.
    """

    def __init__(self, run: Any, table: Callable[..., Any] | None = None) -> None:
        self._run = run
        self._table = table
        self._samples: list[list[Any]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        self._run.log(dict(metrics), step=step)

    def sample(self, row: Mapping[str, Any]) -> None:
        """Keep a sampled response for the table, which is sent at the end."""
        if self._table is not None and len(self._samples) < MAX_SAMPLES:
            cells = [row["step"], str(row["prompt"]), row["completion"], row["score"]]
            self._samples.append(cells)

    def rewind(self, step: int) -> None:
        """Do nothing: the targets keep what was sent."""

    def close(self) -> None:
        """Send the table of samples, flush and close."""
        if self._table is not None and self._samples:
            columns = ["step", "prompt", "completion", "score"]
            self._run.log({"samples": self._table(columns=columns, data=self._samples)})
        self._run.finish()


class MlflowSink:
    """Write metrics to an MLflow run; a resumed stage continues its run."""

    def __init__(self, directory: Path, tracking: Tracking) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]  (an extra)

        self._entities = mlflow.entities
        self._client: Any = mlflow.MlflowClient()
        found = _run_of(directory, tracking)
        known = self._client.get_experiment_by_name(found.project)
        experiment = (
            self._client.create_experiment(found.project) if known is None else known.experiment_id
        )
        before = self._client.search_runs([experiment], f"tags.`align.id` = '{found.id}'")
        if before:
            self._id = before[0].info.run_id
            self._client.set_terminated(self._id, status="RUNNING")
            return
        tags = {"align.id": found.id, "group": found.group, **dict.fromkeys(tracking.tags, "true")}
        self._id = self._client.create_run(experiment, run_name=found.name, tags=tags).info.run_id
        params = [
            mlflow.entities.Param(key[:250], str(value)[:500])
            for key, value in _flat(tracking.config).items()
        ]
        for start in range(0, len(params), 100):  # MLflow's limit for one call
            self._client.log_batch(self._id, params=params[start : start + 100])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the finite metrics of one step."""
        now = int(time.time() * 1000)
        rows = [
            self._entities.Metric(name, value, now, step)
            for name, value in metrics.items()
            if math.isfinite(value)
        ]
        self._client.log_batch(self._id, metrics=rows)

    def sample(self, row: Mapping[str, Any]) -> None:
        """Do nothing: samples are in samples.jsonl."""

    def rewind(self, step: int) -> None:
        """Do nothing: MLflow keeps what was sent."""

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


@dataclass(frozen=True, slots=True)
class _Run:
    """Names of a stage in a tracker; the id is the same whenever the stage runs in its folder."""

    project: str
    group: str
    name: str
    id: str


def _run_of(directory: Path, tracking: Tracking) -> _Run:
    path = directory.resolve()
    run = path.parent.name or "align"
    number = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return _Run(tracking.project or run, tracking.group or run, path.name, number)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def _resumable(run: _Run, tracking: Tracking) -> dict[str, Any]:
    """Return the arguments of a tracker's ``init`` for a run that a resumed stage continues."""
    names = {"project": run.project, "name": run.name, "id": run.id, "group": run.group}
    settings = {"tags": list(tracking.tags), "config": dict(tracking.config)}
    return {**names, **settings, "resume": "allow"}


def _wandb(directory: Path, tracking: Tracking) -> Sink:
    import wandb  # pyright: ignore[reportMissingImports]  (an extra)

    found = _run_of(directory, tracking)
    directory.mkdir(parents=True, exist_ok=True)
    run = wandb.init(**_resumable(found, tracking), dir=str(directory))
    return RunSink(run, wandb.Table)


def _trackio(directory: Path, tracking: Tracking) -> Sink:
    import trackio  # pyright: ignore[reportMissingImports]  (an extra)

    found = _run_of(directory, tracking)
    # It has no ids: the name alone says which run of the project continues. Nor has it tags.
    run = trackio.init(
        project=found.project,
        name=f"{found.name}-{found.id[:8]}",
        group=found.group,
        config={**tracking.config, "tags": list(tracking.tags)},
        resume="allow",
        embed=False,
    )
    return RunSink(run)


def _swanlab(directory: Path, tracking: Tracking) -> Sink:
    import swanlab  # pyright: ignore[reportMissingImports]  (an extra)

    found = _run_of(directory, tracking)
    directory.mkdir(parents=True, exist_ok=True)
    run = swanlab.init(**_resumable(found, tracking), log_dir=str(directory / "swanlab"))
    return RunSink(run)


_OPEN: dict[str, Callable[[Path, Tracking], Sink]] = {
    "tensorboard": TensorboardSink,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": MlflowSink,
    "swanlab": _swanlab,
}
