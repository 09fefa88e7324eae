"""Rewards of steps inside PPO: credit where the step ends, and the return of the score alone."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from online_parts import ppo_spec

from align.core.types import Completion, PromptRow
from align.online.algorithms import build_algorithm
from align.online.scoring import apply_scores, score_answers, step_rewards
from align.sampling.rollout import Experience, gather_experience
from reward_models.process import increments, potentials

# Four answers of six tokens: where their steps end, and how likely all is right after each.
SOLUTIONS = [
    ([1, 5], [0.9, 0.8]),
    ([1, 5], [0.9, 0.1]),
    ([5], [0.5]),
    ([0, 1, 2, 3, 4, 5], [0.9, 0.9, 0.9, 0.9, 0.9, 0.8]),
]


class Judged:
    """Score the answers above; without ``dense`` the steps are not told."""

    name, weight = "process", 2.0

    def __init__(self, *, dense: bool) -> None:
        self.invalid: dict = {}
        self.dense = dense

    def __call__(self, *, prompts, completions, **columns) -> list[float]:
        if self.dense:
            self.token_rewards = [
                increments(p, ends, aggregate="min", num_tokens=6) for ends, p in SOLUTIONS
            ]
        return [potentials(p, "min")[-1] for _, p in SOLUTIONS]


def experience_of(*, dense: bool) -> Experience:
    prompt = PromptRow((2, 3), "q", {})
    answer = Completion((4, 5, 6, 7, 8, 1), (0.0,) * 6, "stop", "text", 0)
    found = gather_experience([prompt] * 4, [[answer]] * 4)
    reward = Judged(dense=dense)
    scores = score_answers(found.prompts, found.completions, [reward])
    found = apply_scores(found, scores, truncated_score=None, mask_truncated=False)
    steps = step_rewards(found, [reward])
    assert (steps is not None) == dense
    if steps is not None:
        found = found.with_tokens(step_rewards=steps)
    return found.with_tokens(values=torch.zeros(found.completion.shape))


def returns_of(*, dense: bool) -> torch.Tensor:
    spec = ppo_spec(kl={"coef": 0.0}, gamma=1.0, lam=1.0)
    found = build_algorithm(spec).estimate(experience_of(dense=dense), 0.0)
    return found.per_token["returns"][:, 2:]  # the answers' tokens


def test_the_return_of_an_answer_is_its_score_whatever_its_steps_say():
    expected = [2.0 * s for s in (0.8, 0.1, 0.5, 0.8)]
    for dense in (False, True):
        torch.testing.assert_close(returns_of(dense=dense)[:, 0], torch.tensor(expected))


def test_many_steps_earn_no_more_than_few():
    # The first and the last answer have the same score, with two steps and with six.
    first = returns_of(dense=True)[:, 0]
    assert first[0] == first[3]


def test_what_follows_a_step_is_worth_the_score_minus_what_was_reached():
    # Second answer: 0.9 after token 1, then 0.1; what is left from token 2 on is 2 (0.1 - 0.9).
    torch.testing.assert_close(
        returns_of(dense=True)[1], 2.0 * torch.tensor([0.1, 0.1, -0.8, -0.8, -0.8, -0.8])
    )
    torch.testing.assert_close(returns_of(dense=False)[1], torch.full((6,), 0.2))
