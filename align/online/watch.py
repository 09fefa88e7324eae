"""Evaluation while training: the same held-out prompts, answered by the policy as it is now.

Nothing of it reaches the training: the engine draws by seeds of its own, no gradient is taken, and
the weights are pushed under a version of their own, so that the next step begins as without it.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from align.core import distributed
from align.core.log import MetricsLog
from align.core.types import PromptRow
from align.online import guard
from align.online.annotate import annotate
from align.online.scoring import apply_scores, length_penalty, score_answers
from align.recipe.schema import OnlineStage, WatchSpec
from align.sampling.engine import RolloutEngine
from align.sampling.experience import Experience
from align.sampling.rollout import answer_fixed
from align.training.learner import Learner
from reward_models.base import RewardFunction

log = logging.getLogger(__name__)
NUM_SHOWN = 64
"""Answers of one evaluation that are written down."""
Answer = dict[str, Any]


@dataclass(slots=True)
class Watch:
    """Hold what an evaluation needs and what the evaluations so far have found.

    Attributes:
        prompts: all held-out prompts; each rank responses its part.
        rewards: those of the training. gold: those it never sees.
        push: brings the policy's present weights into the engine under a version number.
        reference: as in the online run, but always there.
        save: keeps the policy's present weights as those of a step.
        prune: forgets all kept weights but those of the given steps.
    """

    stage: OnlineStage
    spec: WatchSpec
    seed: int
    prompts: Sequence[PromptRow]
    rewards: Sequence[RewardFunction]
    gold: Sequence[RewardFunction]
    engine: RolloutEngine
    stop_token_ids: tuple[int, ...]
    push: Callable[[int], None]
    policy: Learner
    reference: nn.Module
    save: Callable[[int], None]
    prune: Callable[[set[int]], None]
    metrics: MetricsLog
    history: list[guard.Evaluation] = field(default_factory=list)
    checkpointed: int | None = None
    """Best step at the newest checkpoint: a resumed run may come back to it."""

    def due(self, step: int) -> bool:
        """Say whether the policy is evaluated after that many steps."""
        return step % self.spec.every == 0 or step == self.stage.steps

    def look(self, step: int) -> dict[str, float]:
        """Evaluate the policy after ``step`` steps; give its numbers and seconds."""
        began = time.monotonic()
        with self.engine.awake():
            # A version that training never uses: the next step pushes again, which also clears
            # what the engine has cached of these prompts. -1 is an engine without weights.
            self.push(-2 - step)
            experience = self._sample()
        experience = annotate(
            experience, self.policy, self.stage, old=True, reference=self.reference, critic=None
        )
        answers, disagreement = self._judged(experience)
        seen = evaluation(
            step, answers, disagreement, {r.name: r.weight for r in self.rewards if r.weight}
        )
        self.history.append(seen)
        if guard.best_step(self.history) == step:
            self.save(step)
            self.prune({at for at in (step, self.checkpointed) if at is not None})
        alarms = self._alarms()
        for alarm in alarms:
            log.warning("step %d: %s; %s", step, alarm.reason, alarm.remedy)
        self.metrics.evaluation(step, {**self._record(alarms), "answers": answers[:NUM_SHOWN]})
        found = numbers(seen, answers) | {"eval/alarms": float(len(alarms))}
        return found | {"time/watch_s": time.monotonic() - began}

    @property
    def stopped_by(self) -> guard.Alarm | None:
        """Give the alarm for which the stage ends now."""
        limits = self.spec.guard
        if limits is None:
            return None
        return guard.stopping_alarm(
            self.history, stop_on=limits.stop_on, window=limits.window, patience=limits.patience
        )

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint holds of the evaluations, as JSON values."""
        self.checkpointed = guard.best_step(self.history)
        self.prune({self.checkpointed})
        return {"history": [asdict(seen) for seen in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history = [guard.Evaluation(**seen) for seen in state["history"]]
        self.checkpointed = guard.best_step(self.history)

    def _sample(self) -> Experience:
        return answer_fixed(
            self.engine,
            self.prompts,
            n=self.spec.samples,
            # Each evaluation draws with the same seeds, so that they differ by the weights alone.
            step=0,
            seed=distributed.derive_seed(self.seed, "watch"),
            sampling=self.stage.sampling,
            stop_token_ids=self.stop_token_ids,
        )

    def _judged(self, experience: Experience) -> tuple[list[Answer], float | None]:
        """Score the responses of all ranks by the training's rewards and by gold."""
        asked, said = experience.prompts, experience.completions
        trained = score_answers(asked, said, self.rewards)
        # Only rewards with members have it, as of their last call.
        spreads = [getattr(reward, "disagreement", math.nan) for reward in self.rewards]
        proxy = apply_scores(
            experience,
            trained,
            truncated_score=self.stage.truncated_score,
            mask_truncated=False,
            penalty=length_penalty(experience, self.stage),
        ).scores.tolist()
        gold = score_answers(asked, said, self.gold)
        tokens = experience.per_token
        ratio = (tokens["old_logprobs"] - tokens["ref_logprobs"]) * experience.completion
        kl = ratio.double().sum(1).tolist()
        groups = experience.group_ids.tolist()
        mine = [
            {
                "prompt_index": groups[i],
                "prompt": asked[i].prompt,
                "completion": said[i].text,
                "proxy": None if math.isnan(proxy[i]) else proxy[i],
                "gold": gold.total[i],
                "rewards": {name: values[i] for name, values in trained.by_name.items()},
                "golds": {name: values[i] for name, values in gold.by_name.items()},
                "kl": kl[i],
                "length": len(said[i].token_ids),
                "repetition": guard.repeated_share(said[i].text),
                "stopped": said[i].finish_reason == "stop",
            }
            for i in range(len(said))
        ]
        parts = distributed.gather_objects((mine, spreads))
        found = [spread for _, part in parts for spread in part if math.isfinite(spread)]
        answers = [answer for part, _ in parts for answer in part]
        return answers, sum(found) / len(found) if found else None

    def _alarms(self) -> list[guard.Alarm]:
        limits = self.spec.guard
        return [] if limits is None else guard.alarms(self.history, window=limits.window)

    def _record(self, alarms: Sequence[guard.Alarm]) -> dict[str, Any]:
        """Give what the report draws of this evaluation."""
        seen = self.history[-1]
        kls = [e.kl for e in self.history]
        curves = {
            name: guard.fit_curve(kls, guard.gains_of(self.history, name))
            for name in ("proxy", "gold")
        }
        return {
            "kl": seen.kl,
            "best_step": guard.best_step(self.history),
            "intervals": {
                name: plain(guard.over_prompts(guard.by_prompt([seen], name)[0][0]))
                for name in ("proxy", "gold", "length")
            },
            "fit": {
                name: {"alpha": plain(fit.alpha), "beta": plain(fit.beta), "top_kl": fit.top_kl}
                for name, fit in curves.items()
                if fit is not None
            },
            "alarms": [alarm._asdict() for alarm in alarms],
        }


def plain(interval: guard.Interval) -> list[float | None]:
    """Give [value, low, high] for JSON, None for what is not a number."""
    return [x if math.isfinite(x) else None for x in interval]


def evaluation(
    step: int, answers: Sequence[Answer], disagreement: float | None, weights: dict[str, float]
) -> guard.Evaluation:
    """Sum up responses, given in the order of their prompts, by prompt."""
    by_prompt: dict[int, list[Answer]] = {}
    for answer in answers:
        by_prompt.setdefault(answer["prompt_index"], []).append(answer)

    def of(name: str) -> list[Any]:
        return [mean([a[name] for a in group]) for group in by_prompt.values()]

    rewards = {n: w * (mean([a["rewards"][n] for a in answers]) or 0.0) for n, w in weights.items()}
    return guard.Evaluation(
        step=step,
        kl=mean([a["kl"] for a in answers]) or 0.0,
        proxy=of("proxy"),
        gold=of("gold"),
        length=of("length"),
        repetition=of("repetition"),
        rewards=rewards,
        disagreement=disagreement,
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Give the mean of the valid values, None where there is none."""
    known = [float(x) for x in values if x is not None]
    return sum(known) / len(known) if known else None


def numbers(seen: guard.Evaluation, answers: Sequence[Answer]) -> dict[str, float]:
    """Give the metrics of an evaluation; a score that no response has is left out."""
    named = {
        "gold": mean(seen.gold),
        "proxy": mean(seen.proxy),
        "kl": seen.kl,
        "length": mean(seen.length),
        "repetition": mean(seen.repetition),
        "stop_rate": mean([a["stopped"] for a in answers]),
        "disagreement": seen.disagreement,
    }
    for kind in ("rewards", "golds"):
        for name in answers[0][kind]:
            named[f"{kind[:-1]}_{name}"] = mean([a[kind][name] for a in answers])
    return {f"eval/{name}": value for name, value in named.items() if value is not None}
