"""The training monitor: evaluates the current policy on the same held-out prompts during training.

It does not affect training: sampling uses its own seeds, no gradient is computed, and the weights
are pushed under a separate version, so that the next step starts as it would without the monitor.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from align.core import distributed
from align.core.log import MetricsLog
from align.core.types import Alarm, PromptRow
from align.online import guard
from align.online.annotate import annotate
from align.online.scoring import apply_scores, length_penalty, score_answers
from align.recipe.schema import OnlineStage, WatchSpec
from align.sampling.engine import RolloutEngine
from align.sampling.rollout import Experience, answer_fixed
from align.training.heldout import change
from align.training.learner import Learner
from reward_models.base import RewardFunction

NUM_SHOWN = 64
"""Number of responses of one evaluation that are recorded."""
Answer = dict[str, Any]


@dataclass(slots=True)
class Watch:
    """State of the training monitor: its parts and the evaluations so far.

    Attributes:
        prompts: all held-out prompts; each rank responses its part.
        rewards: rewards of the training. gold: rewards that training never sees.
        awake: lets the engine use the accelerator's memory.
        push: pushes the policy's current weights into the engine under a version number.
        reference: as in the online run, but never None.
        save: saves the policy's current weights under a step.
        prune: deletes all saved weights except those of the given steps.
    """

    stage: OnlineStage
    spec: WatchSpec
    seed: int
    prompts: Sequence[PromptRow]
    rewards: Sequence[RewardFunction]
    gold: Sequence[RewardFunction]
    engine: RolloutEngine
    awake: Callable[[], AbstractContextManager[None]]
    stop_token_ids: tuple[int, ...]
    push: Callable[[int], None]
    policy: Learner
    reference: nn.Module
    save: Callable[[int], None]
    prune: Callable[[set[int]], None]
    metrics: MetricsLog
    history: list[guard.Evaluation] = field(default_factory=list)
    checkpointed: list[int] = field(default_factory=list)
    """Best step at each checkpoint that a resumed run may return to."""

    def due(self, step: int) -> bool:
        """Return whether the policy is evaluated after ``step`` steps."""
        return step % self.spec.every == 0 or step == self.stage.steps

    def look(self, step: int) -> dict[str, float]:
        """Evaluate the policy after ``step`` steps and return its metrics and the seconds spent."""
        began = time.monotonic()
        with self.awake():
            # A version that training never uses: the next step pushes again, which also clears the
            # engine's cache of these prompts. -1 is an engine without weights.
            self.push(-2 - step)
            experience = self._sample()
        # Log-probabilities of policy and reference, for the KL; no critic, no gradient.
        experience = annotate(
            experience, self.policy, self.stage, old=True, reference=self.reference, critic=None
        )
        answers, disagreement = self._judged(experience)
        seen = evaluation(
            step,
            answers,
            disagreement=disagreement,
            weights={r.name: r.weight for r in self.rewards if r.weight},
        )
        self.history.append(seen)
        self.keep_best(step)
        alarms = self._alarms()
        for alarm in alarms:
            self.metrics.alarm(step, alarm)
        self.metrics.evaluation(step, {**self._record(alarms), "answers": answers[:NUM_SHOWN]})
        found = numbers(seen, answers) | {"eval/alarms": float(len(alarms))} | self._changes()
        return found | {"time/watch_s": time.monotonic() - began}

    def _changes(self) -> dict[str, float]:
        """Return the changes of both scores since the first evaluation, clustered by prompt."""
        found: dict[str, float] = {}
        if len(self.history) < 2:
            return found
        # Prompts with the same text are one cluster: their responses are not independent.
        texts = [row.input_ids for row in self.prompts]
        for name in ("gold", "proxy"):
            before, now = (getattr(self.history[i], name) for i in (0, -1))
            valid = [
                (text, a, b)
                for text, a, b in zip(texts, before, now, strict=True)
                if a is not None and b is not None
            ]
            parts: dict[tuple[int, ...], list[float]] = {}
            for text, a, b in valid:
                cluster = parts.setdefault(text, [0.0, 0.0])
                # Divided by the number of prompts with a score, so that the parts of the clusters
                # add up to the two means.
                cluster[0] += a / len(valid)
                cluster[1] += b / len(valid)
            if parts:
                found |= change(name, *zip(*parts.values(), strict=True))
        return found

    def keep_best(self, step: int) -> None:
        """Save the weights of the newest evaluation, after ``step`` steps, if it is the best."""
        # The checkpointed bests stay too: a run that resumes there may still return them.
        if guard.best_step(self.history) == step:
            self.save(step)
            self.prune({step, *self.checkpointed})

    @property
    def stopped_by(self) -> Alarm | None:
        """Alarm that ends the stage now, or None."""
        limits = self.spec.guard
        if limits is None:
            return None
        return guard.stopping_alarm(
            self.history, stop_on=limits.stop_on, window=limits.window, patience=limits.patience
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        # One more than is kept: the old checkpoints count until the new one is complete.
        kept = [*self.checkpointed, guard.best_step(self.history)]
        self.checkpointed = kept[-self.stage.keep_checkpoints - 1 :]
        self.prune(set(self.checkpointed))
        history = [asdict(seen) for seen in self.history]
        return {"history": history, "checkpointed": self.checkpointed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.history = [guard.Evaluation(**seen) for seen in state["history"]]
        self.checkpointed = list(state["checkpointed"])

    def _sample(self) -> Experience:
        return answer_fixed(
            self.engine,
            self.prompts,
            n=self.spec.samples,
            # Every evaluation uses the same seeds, so that only the weights differ.
            step=0,
            seed=distributed.derive_seed(self.seed, "watch"),
            sampling=self.stage.sampling,
            stop_token_ids=self.stop_token_ids,
        )

    def _judged(self, experience: Experience) -> tuple[list[Answer], float | None]:
        """Return the responses of all ranks with training and gold scores, and the disagreement."""
        asked, said = experience.prompts, experience.completions
        trained = score_answers(asked, said, self.rewards)
        # Only ensembles have it, from their last call.
        spreads = [getattr(reward, "disagreement", math.nan) for reward in self.rewards]
        proxy = apply_scores(
            experience,
            trained,
            truncated_score=self.stage.truncated_score,
            mask_truncated=False,
            penalty=length_penalty(experience, self.stage),
        ).scores.tolist()
        # The gold score sees the responses as they are, without penalties of the training.
        gold = score_answers(asked, said, self.gold)
        tokens = experience.per_token
        ratio = (tokens["old_logprobs"] - tokens["ref_logprobs"]) * experience.completion
        # k1 summed over the completion: an unbiased estimate per response, in nats.
        kl = ratio.double().sum(1).tolist()
        # Places of the prompts in the whole list, which all ranks share.
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
        # Every rank gets all responses, so the guard decides the same on each.
        parts = distributed.gather_objects((mine, spreads))
        found = [spread for _, part in parts for spread in part if math.isfinite(spread)]
        answers = [answer for part, _ in parts for answer in part]
        return answers, sum(found) / len(found) if found else None

    def _alarms(self) -> list[Alarm]:
        limits = self.spec.guard
        return [] if limits is None else guard.alarms(self.history, window=limits.window)

    def _record(self, alarms: Sequence[Alarm]) -> dict[str, Any]:
        """Return the record of the newest evaluation for the report."""
        seen = self.history[-1]
        kls = [e.kl for e in self.history]
        # The fits of arXiv:2210.10760: each score as a function of the square root of the KL.
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
    """Return [value, low, high] for JSON, with None for NaN and infinities."""
    return [x if math.isfinite(x) else None for x in interval]


def evaluation(
    step: int, answers: Sequence[Answer], *, disagreement: float | None, weights: dict[str, float]
) -> guard.Evaluation:
    """Return the evaluation of responses, which are ordered by prompt."""
    # Each rank has neighboring prompts and the ranks come in order, so this is the prompts' order.
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
    """Return the mean of the valid values, or None if there are none."""
    known = [float(x) for x in values if x is not None]
    return sum(known) / len(known) if known else None


def numbers(seen: guard.Evaluation, answers: Sequence[Answer]) -> dict[str, float]:
    """Return the metrics of an evaluation, without scores that no response has."""
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
