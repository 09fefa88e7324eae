"""Numbers that the tests of other suites hold their formulas to, put to ours.

The inputs and, where a suite states them, the results are its tests'; the other results are the
arithmetic of the same test by hand. What such a test compares with its own code is not here.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from align.losses.kl import AdaptiveKL, corrected_kl, kl_estimate
from align.losses.policy import (
    cispo_policy_loss,
    clipped_policy_loss,
    gspo_policy_loss,
    importance_weights,
)
from align.losses.preference import dpo_loss
from align.losses.supervised import nll
from align.online.advantages import (
    gae,
    group_relative,
    leave_one_out,
    overlong_penalty,
    shaped_rewards,
)
from align.online.objective import reduce_policy_loss
from align.training.batch import PackedBatch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "algorithms.md"
NAN = float("nan")
Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Case:
    """A result of one of our functions, and the numbers of a suite's test."""

    source: str
    what: str
    found: Callable[[], Tensor | float]
    expected: Sequence[float]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def aggregated(rule: str, parts: Sequence[Rows], max_tokens: int = 1) -> float:
    """Sum the micro-batches' parts of a mean; a NaN is a masked token."""
    every = [[x for x in row if not math.isnan(x)] for rows in parts for row in rows]
    counts = {
        "tokens": float(sum(map(len, every))),
        "answers": float(sum(bool(row) for row in every)),
    }
    total = 0.0
    for rows in parts:
        flat = torch.tensor([[x for row in rows for x in row]], dtype=torch.float64)
        ids = torch.tensor([i for i, row in enumerate(rows) for _ in row])
        batch = PackedBatch(
            input_ids=torch.zeros(flat.shape, dtype=torch.long),
            position_ids=torch.zeros(flat.shape, dtype=torch.long),
            mask=~flat.isnan(),
            segment_ids=ids,
            num=len(rows),
            counts=counts,
        )
        total += float(reduce_policy_loss(flat, batch, aggregation=rule, max_tokens=max_tokens))
    return total


# Three tokens with ratios 1/2, 1 and 3/2 to the old policy, as NeMo-RL's loss tests have them.
NOW, OLD = column(math.log(0.5) - 1, -1.0, math.log(1.5) - 1), column(-1.0, -1.0, -1.0)
GENERATED, ADVANTAGES = column(-0.5, -1.5, -0.8), column(1.0, -1.0, 2.0)
ALL = torch.ones(3, dtype=torch.bool)
CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def clipped(now: Tensor, old: Tensor, advantages: Tensor, **options: float) -> Tensor:
    mask = torch.ones_like(now, dtype=torch.bool)
    return clipped_policy_loss(now, old, advantages, mask, **{**CLIP, **options}).loss


def response_loss() -> Tensor:
    one = torch.zeros(3, dtype=torch.long)
    return gspo_policy_loss(NOW, OLD, ADVANTAGES, ALL, segment_ids=one, num_segments=1, **CLIP).loss


def weights(old: Tensor, sampled: Tensor, mode: str, cap: float, **options) -> Tensor:
    mask = torch.ones_like(old, dtype=torch.bool)
    return importance_weights(old, sampled, mask, mode=mode, cap=cap, **options)


def slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    function(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    return gae(rewards, values, mask, gamma=gamma, lam=lam)[0][mask]


NEMO_GAE = (
    column(0.3, 0.0, -0.2, 1.0)[None],
    column(0.2, 999.0, 0.5, 0.8)[None],
    torch.tensor([[True, False, True, True]]),
)
VERL_GAE = (
    column(0, 0, 0.1, 0.1, 0.1, 0, 0, 0.1, 1.0, 0, 0)[None],
    column(-70, 0.4, 4, 5, 6, -30, 0.2, 7, 9, 0, 0)[None],
    torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]]).bool(),
)


def kl_in_the_reward() -> Tensor:
    mask = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    values = torch.tensor([[8, 0.2, 9, 0.7, 8], [0.1, 0.3, 0.5, 8, 8], [8.0] * 5]).double()
    # k1 is 0.2 nats at every token.
    kl = torch.full_like(values, 0.2)
    rewards = shaped_rewards(column(1.0, -0.5, 3.0), kl, mask, kl_coef=0.1)
    return advantages(rewards, values, mask, 1.0, 1.0)


def adapted() -> float:
    controller = AdaptiveKL(0.1, target=1.0, horizon=100)
    controller.update(1.2, 10)
    return controller.coef


OPENRLHF, VERL = "OpenRLHF/tests/", "verl/tests/trainer/ppo/"
NEMO, PRIME = "NeMo-RL/tests/unit/algorithms/", "prime-rl/tests/unit/"
VERL_ROWS = [[1, 2, NAN, NAN], [5, 6, 7, NAN], [9, NAN, NAN, NAN]]
CASES = [
    Case(
        OPENRLHF + "test_loss_aggregation.py",
        "token mean, whole and on two ranks",
        lambda: column(
            aggregated("token", [[[1, 2, NAN], [3, 4, 5], [7, NAN, NAN]]]),
            aggregated("token", [[[1, 2, NAN], [3, 4, 5]], [[7, NAN, NAN]]]),
        ),
        [22 / 6, 22 / 6],
    ),
    Case(
        OPENRLHF + "test_loss_aggregation.py",
        "mean of responses, whole and on two ranks",
        lambda: column(
            aggregated("sequence", [[[1, 3, NAN], [2, 4, NAN], [8, NAN, NAN]]]),
            aggregated("sequence", [[[1, 3, NAN], [2, 4, NAN]], [[8, NAN, NAN]]]),
        ),
        [13 / 3, 13 / 3],
    ),
    Case(
        OPENRLHF + "test_loss_aggregation.py",
        "a masked response counts nowhere",
        lambda: aggregated("sequence", [[[1, 3], [NAN, NAN]]]),
        [2.0],
    ),
    Case(
        OPENRLHF + "test_loss_aggregation.py",
        "token mean over two micro-batches of 2 and 5 tokens",
        lambda: aggregated("token", [[[1, 2, NAN]], [[3, 4, 5], [6, 7, NAN]]]),
        [4.0],
    ),
    Case(OPENRLHF + "test_kl_controller.py", "a KL of 1.2 at target 1", adapted, [0.102]),
    Case(
        OPENRLHF + "test_length_penalty.py",
        "5 and 7 tokens of at most 8, buffer 3",
        lambda: overlong_penalty(torch.tensor([5, 7]), limit=8, buffer=3),
        [0.0, -2 / 3],
    ),
    Case(
        OPENRLHF + "test_experience_maker.py",
        "Dr. GRPO over the valid siblings",
        lambda: group_relative(column(1.0, 3.0), torch.tensor([0, 0]), scale="none"),
        [-1.0, 1.0],
    ),
    Case(
        OPENRLHF + "test_experience_maker.py",
        "Dr. GRPO with one valid sibling",
        lambda: group_relative(column(1.0), torch.tensor([0]), scale="none"),
        [0.0],
    ),
    Case(
        VERL + "test_loss_aggregation_on_cpu.py",
        "Dr. GRPO, limit 4 and 10",
        lambda: column(
            aggregated("constant", [VERL_ROWS], 4), aggregated("constant", [VERL_ROWS], 10)
        ),
        [30 / 12, 30 / 30],
    ),
    Case(
        VERL + "test_loss_aggregation_on_cpu.py",
        "Dr. GRPO on two ranks",
        lambda: aggregated(
            "constant",
            [[[1, 2, NAN], [4, NAN, NAN]], [[7, 8, 9], [10, NAN, 12]]],
            6,
        ),
        [53 / 24],
    ),
    Case(
        VERL + "test_loss_aggregation_on_cpu.py",
        "Dr. GRPO, a masked response counts nowhere",
        lambda: aggregated("constant", [[[1, 2, NAN], [NAN] * 3, [7, NAN, NAN]]], 3),
        [10 / 6],
    ),
    Case(
        VERL + "test_standard_ppo_on_cpu.py",
        "ratio 10 at advantage -1, without and with dual clip 3",
        lambda: torch.cat(
            [
                clipped(column(math.log(10.0)), column(0.0), column(-1.0)),
                clipped(column(math.log(10.0)), column(0.0), column(-1.0), dual_clip=3.0),
            ]
        ),
        [10.0, 3.0],
    ),
    Case(
        VERL + "test_core_algos_on_cpu.py",
        "GAE over tool output, gamma = lambda = 1/2",
        lambda: advantages(*VERL_GAE, 0.5, 0.5),
        [-2.09375, -2.775, -3.5, -4.4, -8.0],
    ),
    Case(
        VERL + "test_kl_reward_on_cpu.py",
        "NaN under the mask stays out of the reward",
        lambda: shaped_rewards(
            column(1.0), column(0.0, NAN)[None], torch.tensor([[True, False]]), kl_coef=0.1
        ),
        [1.0, 0.0],
    ),
    Case(
        VERL + "test_rollout_corr.py",
        "ratios e^-1 and e^0.5 masked to [0.5, 2]",
        lambda: weights(column(-2.0, -2.0), column(-1.0, -2.5), "mask", 2.0, floor=0.5),
        [0.0, 1.649],
    ),
    Case(
        NEMO + "test_loss_functions.py",
        "clip at ratios 0.5, 1, 1.5",
        lambda: torch.cat([loss := clipped(NOW, OLD, ADVANTAGES), loss.mean()[None]]),
        [-0.5, 1.0, -2.4, -0.6333],
    ),
    Case(
        NEMO + "test_loss_functions.py",
        "CISPO at ratios 0.5, 1, 1.5",
        lambda: cispo_policy_loss(NOW, OLD, ADVANTAGES, ALL, **CLIP).loss,
        [0.8 * 1.69315, -1.0, 2 * 1.2 * 0.59453],
    ),
    Case(
        NEMO + "test_loss_functions.py",
        "one ratio for the response",
        response_loss,
        [-0.9086, 0.9086, -1.8171],
    ),
    Case(
        NEMO + "test_loss_functions.py",
        "importance weights times the clipped loss",
        lambda: (weights(OLD, GENERATED, "truncate", 10.0) * clipped(NOW, OLD, ADVANTAGES)).mean(),
        [-0.2065],
    ),
    Case(
        NEMO + "test_loss_functions.py",
        "importance weight of the response",
        lambda: weights(
            OLD,
            GENERATED,
            "truncate",
            10.0,
            level="sequence",
            segment_ids=torch.zeros(3, dtype=torch.long),
            num_segments=1,
        ),
        [0.8187] * 3,
    ),
    Case(
        NEMO + "test_loss_functions.py",
        "weights truncated at 2, without a lower bound",
        lambda: weights(column(0.1, 1.0, 3.0).log(), column(0.0, 0.0, 0.0), "truncate", 2.0),
        [0.1, 1.0, 2.0],
    ),
    Case(
        NEMO + "test_loss_functions.py",
        "IcePop keeps [0.5, 5]",
        lambda: weights(OLD, column(-0.5, -3.5, -0.8), "mask", 5.0, floor=0.5),
        [0.6065, 0.0, 0.8187],
    ),
    *[
        Case(
            NEMO + "test_loss_functions.py",
            f"KL estimate {kind}",
            lambda kind=kind: kl_estimate(OLD, column(0.0, -15.0, -30.0), kind),
            expected,
        )
        for kind, expected in (
            ("k1", [-1.0, 14.0, 29.0]),
            ("k2", [0.5, 98.0, 420.5]),
            ("k3", [0.7183, 13.0, 28.0]),
        )
    ],
    Case(
        NEMO + "test_loss_functions.py",
        "KL in the loss",
        lambda: kl_estimate(column(0.0, -1.0, -2.0), OLD, "k3"),
        [0.368, 0.0, 0.718],
    ),
    Case(
        NEMO + "test_loss_functions.py",
        "gradient of the KL with its sampling term",
        lambda: slope(
            lambda now: 0.15 * corrected_kl(now, column(-1.5, -0.4), column(-0.9, -1.1)),
            column(-1.2, -0.7),
        ),
        # w (k3 + dk3) times 0.3 / 2, where k3 + dk3 is now - ref: -0.3 and 0.4.
        [0.15 * math.exp(0.3) * -0.3, 0.15 * math.exp(-0.3) * 0.4],
    ),
    Case(
        NEMO + "test_loss_functions.py",
        "DPO of alike responses",
        lambda: dpo_loss(*(column(-5.5452),) * 2, *(column(0.0),) * 2, beta=0.1).loss,
        [math.log(2)],
    ),
    Case(
        NEMO + "test_utils.py",
        "leave one out, two prompts of three",
        lambda: leave_one_out(column(1, 2, 3, 4, 5, 6), torch.tensor([0, 0, 0, 1, 1, 1])),
        [1 - 2.5, 0.0, 3 - 1.5, 4 - 5.5, 0.0, 6 - 4.5],
    ),
    Case(
        NEMO + "test_utils.py",
        "leave one out, prompts of two and three",
        lambda: leave_one_out(column(1, 2, 4, 5, 6), torch.tensor([0, 0, 1, 1, 1])),
        [1 - 2.0, 2 - 1.0, 4 - 5.5, 0.0, 6 - 4.5],
    ),
    Case(
        NEMO + "test_utils.py",
        "leave one out, one response each",
        lambda: leave_one_out(column(2.5, 4.0), torch.tensor([0, 1])),
        [0.0, 0.0],
    ),
    Case(
        NEMO + "test_utils.py",
        "leave one out, alike rewards",
        lambda: leave_one_out(column(3, 3, 3, 7, 7, 7), torch.tensor([0, 0, 0, 1, 1, 1])),
        [0.0] * 6,
    ),
    Case(
        NEMO + "test_utils.py",
        "leave one out, an invalid response left out",
        lambda: leave_one_out(column(1, 3, 4, 5, 6), torch.tensor([0, 0, 1, 1, 1])),
        [1 - 3.0, 3 - 1.0, 4 - 5.5, 0.0, 6 - 4.5],
    ),
    Case(
        NEMO + "test_utils.py",
        "leave one out, rewards of 1e-8 and 1e8",
        lambda: leave_one_out(
            column(1e-8, 2e-8, 3e-8, 1e8, 2e8, 3e8), torch.tensor([0, 0, 0, 1, 1, 1])
        ),
        [-1.5e-8, 0.0, 1.5e-8, -1.5e8, 0.0, 1.5e8],
    ),
    *[
        Case(
            NEMO + "test_gae.py",
            f"GAE over a gap, gamma {gamma}, lambda {lam}",
            lambda gamma=gamma, lam=lam: advantages(*NEMO_GAE, gamma, lam),
            expected,
        )
        for gamma, lam, expected in (
            (1.0, 1.0, [0.3 - 0.2 + 1 - 0.2, -0.2 + 1 - 0.5, 1 - 0.8]),
            (1.0, 0.8, [0.6 + 0.8 * 0.26, 0.1 + 0.8 * 0.2, 0.2]),
            (0.99, 1.0, [0.595 + 0.99 * 0.29, 0.092 + 0.99 * 0.2, 0.2]),
        )
    ],
    Case(
        NEMO + "test_gae.py",
        "GAE with the KL in the reward",
        kl_in_the_reward,
        [0.96 - 0.2, 0.98 - 0.7, -0.56 - 0.1, -0.54 - 0.3, -0.52 - 0.5],
    ),
    Case(
        PRIME + "orchestrator/test_advantage.py",
        "group mean",
        lambda: group_relative(
            column(1.0, 0.0, 0.5, 0.5), torch.tensor([0, 0, 1, 1]), scale="none"
        ),
        [0.5, -0.5, 0.0, 0.0],
    ),
    Case(
        PRIME + "train/rl/test_loss_numerics.py",
        "ratio e inside the bounds: loss and gradient",
        lambda: torch.cat(
            [
                clipped(column(-2.0), column(-3.0), column(1.0), clip_high=19.0),
                slope(
                    lambda now: clipped(now, column(-3.0), column(1.0), clip_high=19.0),
                    column(-2.0),
                ),
            ]
        ),
        [-math.e, -math.e],
    ),
    Case(
        PRIME + "train/rl/test_loss_terms.py",
        "weighted likelihood",
        lambda: nll(
            column(-1, -2, -3, -4),
            torch.tensor([True, False, True, False]),
            1,
            weights=column(0.5, 0.5, 2.0, 1.0),
        ),
        [6.5],
    ),
    Case(
        PRIME + "train/rl/test_loss.py",
        "weighted likelihood of two of three tokens",
        lambda: nll(
            column(-0.1, -0.5, -0.2),
            torch.tensor([True, False, True]),
            1,
            weights=column(0.1, 0.0, 0.1),
        ),
        [0.03],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.source}: {case.what}")
def test_numbers_of_other_suites(case: Case) -> None:
    found = torch.as_tensor(case.found(), dtype=torch.float64).flatten().tolist()
    # The suites round to four digits.
    assert found == pytest.approx(list(case.expected), rel=1e-3, abs=1e-12)


def test_the_page_counts_the_cases() -> None:
    rows = re.findall(
        r"^\| `([^`]+\.py)` \| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {name: int(count) for name, count in rows} == Counter(c.source for c in CASES)
