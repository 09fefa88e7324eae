"""Put evaluation while training together, and turn what it found into the stage's outcome."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from align.core import distributed
from align.core.errors import DataError
from align.core.log import MetricsLog
from align.core.types import PromptRow
from align.online import guard
from align.online.loop import OnlineRun
from align.online.watch import Watch
from align.recipe.schema import WatchSpec
from align.stages.best import BestWeights
from reward_models.base import RewardFunction


def build_watch(
    run: OnlineRun,
    spec: WatchSpec,
    *,
    prompts: Sequence[PromptRow],
    gold: Sequence[RewardFunction],
    reference: nn.Module,
    best: BestWeights,
    metrics: MetricsLog,
) -> Watch:
    """Put together what evaluates an online run while it trains.

    Raises:
        DataError: there are fewer held-out prompts than ranks.
    """
    if len(prompts) < max(2, distributed.world_size()):
        raise DataError(
            f"watch.prompts: {len(prompts)} rows for {distributed.world_size()} ranks; expected at "
            "least one for each rank, and two for an interval"
        )
    return Watch(
        stage=run.spec,
        spec=spec,
        seed=run.seed,
        prompts=prompts,
        rewards=run.rewards,
        gold=gold,
        engine=run.engine,
        stop_token_ids=run.stop_token_ids,
        push=run.push,
        policy=run.policy,
        reference=reference,
        save=best.save,
        prune=best.prune,
        metrics=metrics,
    )


def finish_watch(watch: Watch, best: BestWeights) -> dict[str, Any]:
    """Keep the weights that were asked for; give the manifest's notes on it.

    Where the guard ended the stage these are the best ones, whatever ``keep`` says.
    """
    top, alarm = guard.best_step(watch.history), watch.stopped_by
    best.prune({top})
    restored = watch.spec.keep == "best" or alarm is not None
    if restored:
        best.restore(top)
    found: dict[str, Any] = {"best_step": top, "last_step": watch.history[-1].step}
    if restored:
        found["restored_step"] = top
    if alarm is not None:
        found |= {"stopped_by": "guard", "alarm": alarm.name, "reason": alarm.reason}
    return {"watch": found}
