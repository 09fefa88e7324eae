"""Process reward: a scorer of every step of a solution, made safe for reinforcement learning.

After each step, the scorer predicts the probability that everything so far is correct. These
probabilities become one score (``min``, ``last`` or ``product``), never a sum, which would reward
writing more steps. The score so far is also a potential over the prefixes of a response. Its
differences, assigned to the tokens that end the steps, add up to the score itself. The learner thus
sees which step gained or lost, and responses keep the order of their scores regardless of the
number of steps.

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
    """Return the positions of the tokens that end the steps of a response.

    A token that contains the separator ends a step. The text after the last one is also a step,
    which ends with the response.

    Args:
        ids: token ids of the response, at least one.
        tokenizer: tokenizer of the ids.
        separator: text between two steps.
    """
    # Decode each distinct token once; a response repeats most of its tokens.
    holds = {i: separator in tokenizer.decode([i]) for i in set(ids)}
    ends = [t for t, i in enumerate(ids) if holds[i]]
    return ends if ends and ends[-1] == len(ids) - 1 else [*ends, len(ids) - 1]


def potentials(probabilities: Sequence[float], aggregate: str) -> list[float]:
    """Return the score of a response as if it ended after each of its steps.

    Args:
        probabilities: probability after each step that everything so far is correct.
        aggregate: ``min`` of them, the ``last`` one, or their ``product``.
    """
    found: list[float] = []
    for p in probabilities:
        # With no step yet everything is correct: min and product start at 1.
        before = found[-1] if found else 1.0
        found.append({"min": min(before, p), "last": p, "product": before * p}[aggregate])
    return found


def increments(
    probabilities: Sequence[float], ends: Sequence[int], *, aggregate: str, num_tokens: int
) -> list[float]:
    """Assign the differences of the potentials to the tokens that end the steps; 0 elsewhere.

    The potential before the first step is 0, so the sum is the last potential: the score.
    """
    tokens = [0.0] * num_tokens
    before = 0.0
    for end, value in zip(ends, potentials(probabilities, aggregate), strict=True):
        tokens[end] += value - before
        before = value
    return tokens


class ProcessReward:
    """Score solutions step by step with a scorer that was trained with step supervision.

    Attributes:
        token_rewards: of the last call: one number per token of each response, which sum to its
            score.
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
        """Check the tokenizer of the given token ids.

        Raises:
            ValueError: its vocabulary differs, so step ends are not tokens of the policy.
        """
        if not self._scalar.shares_vocabulary(tokenizer):
            raise ValueError(
                f"reward '{self.name}': a process reward assigns scores to the policy's tokens, "
                "but its tokenizer differs. Train it on a policy with the same tokenizer."
            )

    def __call__(
        self, *, prompts: Sequence[Text], completions: Sequence[Text], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Score each solution by the probabilities after its steps."""
        check_rows(prompts, completions, reward=self.name)
        rows = self._scalar.rows(prompts, completions, columns)
        # The response starts after the given prompt ids, or after the rendered prompt.
        if "completion_ids" in columns and "prompt_ids" in columns:
            starts = [len(ids) for ids in columns["prompt_ids"]]
        else:
            pairs = zip(prompts, completions, strict=True)
            starts = [self._scalar.num_prompt_tokens(*pair) for pair in pairs]
        limit = self._scalar.model.max_tokens
        fits = [limit is None or len(row) <= limit for row in rows]
        short = [row for row, fit in zip(rows, fits, strict=True) if fit]
        values = iter(
            token_values(self._scalar.model, short, micro_tokens=self._scalar.micro_tokens)
        )
        self.token_rewards = []
        scores: list[float | None] = []
        for row, start, fit in zip(rows, starts, fits, strict=True):
            answer = row[start:]
            if fit:
                scores.append(self._solution(answer, next(values)[start:].tolist()))
                continue
            self.invalid[f"longer than the {limit} positions of the scorer"] += 1
            self.token_rewards.append([0.0] * len(answer))
            scores.append(None)
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
        ValueError: the scorer was not trained with step supervision.
    """
    scalar = load_scalar(spec, normalize=False)
    model: RewardModel = scalar.model
    if model.extra.get("supervision") != "steps":
        raise ValueError(
            f"reward '{scalar.name}': {spec.model} was trained with supervision "
            f"{model.extra.get('supervision', 'pairs')}. A process reward needs a reward stage "
            "with supervision: steps; use kind: scalar for others."
        )
    separator = model.extra["step_separator"]
    return ProcessReward(scalar, separator=separator, aggregate=spec.aggregate)
