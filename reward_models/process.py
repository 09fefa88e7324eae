"""Process reward: a scorer that reads every step of a solution, made safe for reinforcement.

The scorer says after each step how likely all is right so far. These probabilities become one
score (``min``, ``last`` or ``product``), and never a sum: a sum pays for writing more steps. The
score so far is also a potential over the beginnings of an answer. Its differences, laid on the
tokens that end the steps, add up to the score itself, so that a learner sees at once which step
gained or lost, and answers stay in the order of their scores however many steps they have.

Reference: potential-based shaping, Ng, Harada and Russell 1999; step scores arXiv:2305.20050.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reward_models.base import Text, check_rows
from reward_models.learned import ScalarReward, load_scalar
from reward_models.scalar import RewardModel, token_values
from reward_models.specs import ProcessSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AGGREGATES = ("min", "last", "product")


def step_ends(
    ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", separator: str
) -> list[int]:
    """Give the places of the tokens that end the steps of an answer.

    A token that holds the separator ends a step; what follows the last one is a step too, and
    ends with the answer.

    Args:
        ids: token ids of the answer, at least one.
        tokenizer: theirs. separator: text between two steps.
    """
    holds = {i: separator in tokenizer.decode([i]) for i in set(ids)}
    ends = [t for t, i in enumerate(ids) if holds[i]]
    return ends if ends and ends[-1] == len(ids) - 1 else [*ends, len(ids) - 1]


def potentials(probabilities: Sequence[float], aggregate: str) -> list[float]:
    """Give the score of an answer as if it ended after each of its steps.

    Args:
        probabilities: that all is right so far, after each step.
        aggregate: ``min`` of them, the ``last`` one, or their ``product``.
    """
    found: list[float] = []
    for p in probabilities:
        before = found[-1] if found else 1.0
        found.append({"min": min(before, p), "last": p, "product": before * p}[aggregate])
    return found


def increments(
    probabilities: Sequence[float], ends: Sequence[int], *, aggregate: str, num_tokens: int
) -> list[float]:
    """Lay the differences of the potentials on the tokens that end the steps; 0 elsewhere.

    The potential before the first step is 0, so the sum is the last potential: the score.
    """
    tokens = [0.0] * num_tokens
    before = 0.0
    for end, value in zip(ends, potentials(probabilities, aggregate), strict=True):
        tokens[end] += value - before
        before = value
    return tokens


class ProcessReward:
    """Score solutions step by step with a scorer that a reward stage taught by steps.

    Attributes:
        token_rewards: of the last call, for each answer one number a token whose sum is its score.
    """

    def __init__(self, scalar: ScalarReward, *, separator: str, aggregate: str = "min") -> None:
        if aggregate not in AGGREGATES:
            raise ValueError(
                f"reward '{scalar.name}': aggregate {aggregate!r} is unknown; use one of "
                f"{', '.join(AGGREGATES)}"
            )
        self._scalar = scalar
        self.separator = separator
        self.aggregate = aggregate
        self.name = scalar.name
        self.__name__ = scalar.name
        self.weight = scalar.weight
        self.invalid: Counter[str] = Counter()
        self.token_rewards: list[list[float]] = []

    def meet(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Learn whose token ids will be given.

        Raises:
            ValueError: of another vocabulary, so the steps' ends are no tokens of the policy.
        """
        if not self._scalar.shares_vocabulary(tokenizer):
            raise ValueError(
                f"reward '{self.name}': a process reward lays scores on the policy's tokens, and "
                "its own are others; train it on a policy with the same tokenizer"
            )

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """Score each solution by the probabilities after its steps."""
        check_rows(prompts, completions, reward=self.name)
        rows = self._scalar.rows(prompts, completions, columns)
        if "completion_ids" in columns and "prompt_ids" in columns:
            starts = [len(ids) for ids in columns["prompt_ids"]]
        else:
            pairs = zip(prompts, completions, strict=True)
            starts = [self._scalar.num_prompt_tokens(*pair) for pair in pairs]
        values = token_values(self._scalar.model, rows, micro_tokens=self._scalar.micro_tokens)
        self.token_rewards = []
        scores: list[float | None] = []
        for row, start, found in zip(rows, starts, values, strict=True):
            scores.append(self._solution(row[start:], found[start:].tolist()))
        return scores

    def _solution(self, answer: Sequence[int], log_odds: Sequence[float]) -> float | None:
        if not answer:
            self.invalid["empty answer"] += 1
            self.token_rewards.append([])
            return None
        ends = step_ends(answer, self._scalar.tokenizer, self.separator)
        chances = [_sigmoid(log_odds[end]) for end in ends]
        if not all(map(math.isfinite, chances)):
            self.invalid["score is not finite"] += 1
            self.token_rewards.append([0.0] * len(answer))
            return None
        self.token_rewards.append(
            increments(chances, ends, aggregate=self.aggregate, num_tokens=len(answer))
        )
        return potentials(chances, self.aggregate)[-1]


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def build_process(spec: ProcessSpec) -> ProcessReward:
    """Load the process reward of a spec's ``model`` folder.

    Raises:
        ValueError: the scorer was not taught by steps.
    """
    scalar = load_scalar(spec, normalise=False)
    model: RewardModel = scalar.model
    if model.extra.get("supervision") != "steps":
        raise ValueError(
            f"reward '{scalar.name}': {spec.model} was taught by "
            f"{model.extra.get('supervision', 'pairs')}; a process reward needs a reward stage "
            "with supervision: steps, any other is kind: scalar"
        )
    separator = model.extra["step_separator"]
    return ProcessReward(scalar, separator=separator, aggregate=spec.aggregate)
