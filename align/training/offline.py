"""The training loop of the offline methods (SFT, reward models, DPO): one Learner, fixed data.

The batch of a step depends only on the seed and the step. Every rank has the rows of the whole
data set and knows the whole batch of a step, so the global counts of a loss need no communication.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from align.core import distributed
from align.core.checkpoints import (
    CheckpointTimer,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from align.core.distributed import stops_between_steps
from align.core.log import MetricsLog
from align.data.sampler import pick
from align.training.diagnosis import Diagnosis
from align.training.heldout import HeldOut
from align.training.learner import Learner, evaluate
from align.training.stopping import EarlyStopping
from align.training.task import OfflineTask, measured

log = logging.getLogger(__name__)
OPTIM = ("grad_norm", "learning_rate", "update_ratio", "update_per_rate", "weight_rms")
"""Statistics of the optimizer, which are logged under ``optim/``."""


@dataclass(frozen=True, slots=True)
class OfflineSchedule:
    """Length of the training, batch sizes, and intervals of evaluation and checkpoints."""

    total_steps: int
    batch_size: int
    micro_tokens: int
    eval_every: int
    checkpoint_every: int | Literal["auto"]
    keep_checkpoints: int
    seed: int


def num_steps(num_rows: int, *, batch_size: int, epochs: float, steps: int | None) -> int:
    """Return the number of optimizer steps: ``steps``, or else whole batches of the epochs."""
    return steps if steps is not None else max(1, round(num_rows * epochs / batch_size))


def total_steps(num_rows: int, *, batch_size: int, epochs: float, steps: int | None) -> int:
    """Return ``num_steps``, and warn if whole batches skip rows or repeat some."""
    found = num_steps(num_rows, batch_size=batch_size, epochs=epochs, steps=steps)
    if batch_size > num_rows:
        log.warning(
            "a batch of %d is larger than the %d rows: every step sees rows more than once; lower "
            "batch_size",
            batch_size,
            num_rows,
        )
    elif steps is None and (missing := round(num_rows * epochs) - found * batch_size):
        log.warning(
            "%d steps of %d rows are not exactly %g x %d rows: %d rows are %s. A batch_size that "
            "divides the number of rows uses all of them equally often",
            found,
            batch_size,
            epochs,
            num_rows,
            abs(missing),
            "left out" if missing > 0 else "repeated",
        )
    return found


@stops_between_steps
def train_offline(
    learner: Learner,
    task: OfflineTask[Any],
    schedule: OfflineSchedule,
    *,
    metrics: MetricsLog,
    checkpoints: Path,
    stopping: EarlyStopping | None = None,
    diagnosis: Diagnosis | None = None,
) -> dict[str, float]:
    """Train to the end of the schedule, resuming from the newest verified checkpoint.

    Held-out rows are also evaluated before the first step: later evaluations have the change since.

    Returns:
        The last step's metrics, the held-out loss and the mean trained tokens per second. With
        ``stopping``, which may end early, the held-out metrics are those of the best evaluation.
    """
    heldout = HeldOut(task, schedule.micro_tokens) if task.heldout else None
    states = {"stopping": stopping, "diagnosis": diagnosis, "heldout": heldout}
    start, last = _resume(learner, metrics=metrics, checkpoints=checkpoints, states=states)
    if heldout is not None and heldout.first is None:
        metrics.log(start, heldout.start(learner.engine))
    log.info("training: %d steps", schedule.total_steps - start)
    keep, timer = schedule.keep_checkpoints, CheckpointTimer(schedule.checkpoint_every)
    save = partial(_save, learner, checkpoints, states=states, keep=keep)
    # Resumed steps are not counted: the token rate is that of this process.
    num_tokens, began = 0, time.monotonic()
    for done in range(start + 1, schedule.total_steps + 1):
        if stopping is not None and stopping.stopped:
            break
        last, step_tokens = _train_step(learner, task, schedule, step=done - 1)
        num_tokens += step_tokens
        if heldout is not None and _evaluates(schedule, done):
            last |= _evaluate(learner, heldout, stopping, done=done)
        metrics.log(done, last)
        if diagnosis is not None:
            diagnosis.report(done, last, metrics)
        timer.after(done, last=schedule.total_steps, save=save)
    if diagnosis is not None:
        diagnosis.finish()
    if stopping is not None:
        last |= stopping.best
    elif heldout is not None and "eval/loss" not in last:
        # No step was left to do, and the log of the last one is lost.
        last |= heldout.look(learner.engine)
    rate = {"tokens/per_s": num_tokens / (time.monotonic() - began)} if num_tokens else {}
    return last | rate


def _train_step(
    learner: Learner, task: OfflineTask[Any], schedule: OfflineSchedule, *, step: int
) -> tuple[dict[str, float], int]:
    """Run one optimizer step and return its metrics and its trained tokens."""
    batch = pick(task.rows, schedule.batch_size, seed=schedule.seed, step=step)
    began = time.monotonic()
    micro = measured(learner.engine, task, batch, micro_tokens=schedule.micro_tokens)
    stats = learner.step(micro, task.loss_fn)
    num_tokens = sum(task.length(row) for row in batch)
    rate = num_tokens / (time.monotonic() - began)
    logged = {"tokens/per_s": rate, "tokens/trained": float(num_tokens)}
    return named(stats) | logged, num_tokens


def _evaluates(schedule: OfflineSchedule, done: int) -> bool:
    """Return whether held-out rows are evaluated after this number of steps."""
    if done == schedule.total_steps:
        return True
    return schedule.eval_every > 0 and done % schedule.eval_every == 0


def _evaluate(
    learner: Learner, heldout: HeldOut, stopping: EarlyStopping | None, *, done: int
) -> dict[str, float]:
    """Return the held-out metrics, which join the line of the step; early stopping sees them."""
    found = heldout.look(learner.engine)
    if stopping is not None:
        stopping.look(done, found)
    return found


def _save(
    learner: Learner,
    checkpoints: Path,
    done: int,
    *,
    states: Mapping[str, EarlyStopping | Diagnosis | HeldOut | None],
    keep: int,
) -> None:
    state = {name: part.state_dict() for name, part in states.items() if part is not None}
    save_checkpoint(checkpoints, done, engines={"policy": learner.engine}, state=state, keep=keep)


def _resume(
    learner: Learner,
    *,
    metrics: MetricsLog,
    checkpoints: Path,
    states: Mapping[str, EarlyStopping | Diagnosis | HeldOut | None],
) -> tuple[int, dict[str, float]]:
    """Load the newest verified checkpoint and return the steps done and the last metrics."""
    found = newest_checkpoint(checkpoints)
    if found is None:
        return 0, {}
    start, state = load_checkpoint(found, {"policy": learner.engine})
    for name, part in states.items():
        if part is not None:
            part.load_state_dict(state[name])
    learner.steps = start
    last = distributed.broadcast_object(metrics.rewind(start))  # rank 0 alone has the log
    log.info("resumed from %s", found)
    return start, last


def evaluate_rows(model: nn.Module, task: OfflineTask[Any], micro_tokens: int) -> dict[str, float]:
    """Return the loss and the statistics of a model over all held-out rows.

    The rows are split across ranks.
    """
    micro = measured(model, task, task.heldout, micro_tokens=micro_tokens)
    return named(evaluate(model, micro, task.loss_fn), group="eval")


def named(stats: dict[str, float], *, group: str = "train") -> dict[str, float]:
    """Prefix statistics with their group; those of the optimizer get ``optim/``."""
    return {(f"optim/{k}" if k in OPTIM else f"{group}/{k}"): v for k, v in stats.items()}
