"""Combine rewards that rate the same property; their disagreement warns of reward hacking."""

import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from reward_models.base import RewardFunction, Text, check_rows, finite_score
from reward_models.specs import EnsembleSpec

logger = logging.getLogger(__name__)


def _mean_minus_std(scores: Sequence[float], kappa: float) -> float:
    return statistics.fmean(scores) - kappa * statistics.pstdev(scores)


def combiner(combine: str, *, kappa: float, reward: str) -> Callable[[Sequence[float]], float]:
    """Return the function that combines the members' scores: mean, min or mean_minus_std.

    Raises:
        ValueError: ``combine`` is none of these.
    """
    combiners: dict[str, Callable[[Sequence[float]], float]] = {
        "mean": statistics.fmean,
        "min": min,
        "mean_minus_std": lambda scores: _mean_minus_std(scores, kappa),
    }
    if combine not in combiners:
        raise ValueError(
            f"reward '{reward}': combine {combine!r} is unknown; use {', '.join(combiners)}"
        )
    return combiners[combine]


def spread(scores: Sequence[float]) -> float:
    """Return the population standard deviation of the members' scores for one response."""
    return statistics.pstdev(scores)


class EnsembleReward:
    """Combine the members' scores of each completion by mean, min or mean - kappa * std.

    A member's weight multiplies its score before they are combined. A completion that any member
    cannot score is invalid, because leaving out that member would change the scale of the score.

    Attributes:
        disagreement: population standard deviation of the members' weighted scores, averaged over
            the completions of the last call; NaN if none was valid.

    Reference: arXiv:2310.02743 penalizes the variance; this uses the standard deviation, which has
        the unit of the score.
    """

    def __init__(
        self,
        members: Sequence[RewardFunction],
        *,
        combine: str = "mean",
        kappa: float = 1.0,
        name: str = "ensemble",
        weight: float = 1.0,
    ) -> None:
        if len(members) < 2:
            raise ValueError(
                f"reward '{name}': {len(members)} member; an ensemble needs at least two"
            )
        self.members = list(members)
        self.combine = combiner(combine, kappa=kappa, reward=name)
        self.name = name
        self.__name__ = name
        self.weight = weight
        self.invalid: Counter[str] = Counter()
        self.disagreement = math.nan

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Return the combined score of each completion."""
        check_rows(prompts, completions, reward=self.name)
        by_member = [
            member(prompts=prompts, completions=completions, **columns) for member in self.members
        ]
        combined: list[float | None] = []
        spreads: list[float] = []
        for row in zip(*by_member, strict=True):
            # Weights first: members may have scores of different sizes.
            scores = [
                member.weight * score
                for member, score in zip(self.members, row, strict=True)
                if score is not None and math.isfinite(score)
            ]
            # Report which members failed, and leave the row without a score.
            if len(scores) < len(row):
                failed = [
                    m.name
                    for m, s in zip(self.members, row, strict=True)
                    if s is None or not math.isfinite(s)
                ]
                self.invalid[f"invalid member: {', '.join(failed)}"] += 1
                combined.append(None)
                continue
            together = finite_score(self.combine(scores))
            if together is None:
                self.invalid["score is not finite"] += 1
            else:
                spreads.append(spread(scores))
            combined.append(together)
        self.disagreement = statistics.fmean(spreads) if spreads else math.nan
        logger.info("reward %s: members disagree by %.4g (std)", self.name, self.disagreement)
        return combined


def build_ensemble(spec: EnsembleSpec) -> EnsembleReward:
    """Build the ensemble of a spec, with each member from its own spec."""
    from reward_models import build_reward

    return EnsembleReward(
        [build_reward(member) for member in spec.members],
        combine=spec.combine,
        kappa=spec.kappa,
        name=spec.label,
        weight=spec.weight,
    )
