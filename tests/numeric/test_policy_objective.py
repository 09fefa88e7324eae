"""The whole policy objective on a hand example: which token weighs how much, and what is reported.

Two responses stand behind prompts of two tokens; the old policy is the current one, so every ratio
is 1 and the gradient of a token's log-probability is minus its advantage times its weights.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.core.types import TokenRow
from align.online.objective import policy_objective
from align.training.batch import PackedBatch, pack

PROMPT = 2
LENGTHS = (2, 4)
ADVANTAGES = (1.5, -0.5)
# Trainer over sampler: 1.5 on the first response; 3, of which 2 are kept, on the second.
WEIGHTS, KEPT = (1.5, 3.0), (1.5, 2.0)
REFERENCE_GAP = 0.4
"""Policy minus reference in nats, on every token of a response."""
COEF = 0.1


def laid_out() -> PackedBatch:
    """Pack the two responses; what stands on prompts must not matter."""
    rows, tokens = [], []
    for n, advantage, weight in zip(LENGTHS, ADVANTAGES, WEIGHTS, strict=True):
        trained = (False,) * PROMPT + (True,) * n
        rows.append(TokenRow(tuple(range(PROMPT + n)), trained))
        old = [-1.0 - 0.1 * t for t in range(PROMPT + n)]
        tokens.append(
            {
                "old_logprobs": old,
                "rollout_logprobs": [x - math.log(weight) for x in old],
                "ref_logprobs": [x - REFERENCE_GAP for x in old],
                "advantages": [advantage] * (PROMPT + n),
            }
        )
    return pack(
        rows,
        # Another micro-batch of the step has 4 tokens and one response.
        counts={"tokens": 10.0, "answers": 3.0},
        per_token={name: [row[name] for row in tokens] for name in tokens[0]},
    )


def objective(**changed: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return loss, gradient of the log-probabilities (N,) and statistics."""
    batch = laid_out()
    logprobs = batch.per_token["old_logprobs"].clone().requires_grad_()
    seen: dict[str, Any] = {}

    def model(*_: Tensor, **options: Any) -> Any:
        seen.update(options)
        return SimpleNamespace(logprobs=logprobs, entropy=torch.full_like(logprobs, 0.7))

    options: dict[str, Any] = {
        "kl_coef": COEF,
        "temperature": 0.7,
        "objective": "clip",
        "clip": {"clip_low": 0.2, "clip_high": 0.2},
        "dual_clip": None,
        "importance": {"mode": "truncate", "cap": 2.0, "level": "token"},
        "kl_in_loss": None,
        "aggregation": "token",
        "max_tokens": 8,
    }
    loss, stats = policy_objective(model, batch, **(options | changed))  # type: ignore[arg-type]
    assert seen["temperature"] == 0.7
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient[0], stats


def per_response(first: float, second: float) -> list[float]:
    """Return these values on the tokens of the two responses, and 0 on the prompts."""
    return [*[0.0] * PROMPT, *[first] * LENGTHS[0], *[0.0] * PROMPT, *[second] * LENGTHS[1]]


@pytest.mark.parametrize(
    ("aggregation", "shares"),
    [
        # What one token's loss counts: 10 tokens; 3 responses, each by its own trained tokens; 3
        # responses; 3 responses of at most 8 tokens.
        ("token", (1 / 10, 1 / 10)),
        ("sequence", (1 / 2 / 3, 1 / 4 / 3)),
        ("sequence_sum", (1 / 3, 1 / 3)),
        ("constant", (1 / 24, 1 / 24)),
    ],
)
def test_each_token_counts_its_advantage_its_weight_and_its_share(aggregation, shares) -> None:
    loss, gradient, _ = objective(aggregation=aggregation)
    terms = [-a * w * s for a, w, s in zip(ADVANTAGES, KEPT, shares, strict=True)]
    assert gradient.tolist() == pytest.approx(per_response(*terms))
    assert float(loss) == pytest.approx(sum(n * x for n, x in zip(LENGTHS, terms, strict=True)))


@pytest.mark.parametrize("kind", ["k2", "k3", "corrected"])
def test_the_kl_in_the_loss_is_added_on_trained_tokens_and_not_weighted(kind) -> None:
    plain_loss, plain, _ = objective()
    loss, gradient, _ = objective(kl_in_loss=kind)
    x = REFERENCE_GAP
    k3 = math.exp(-x) - 1.0 + x
    value, slope = {
        "k2": (x * x / 2.0, x),
        "k3": (k3, 1.0 - math.exp(-x)),
        # The ratio is 1 and has a gradient of its own.
        "corrected": (k3, k3 + 1.0 - math.exp(-x)),
    }[kind]
    assert (gradient - plain).tolist() == pytest.approx(
        per_response(COEF * slope / 10, COEF * slope / 10), abs=1e-7
    )
    assert float(loss - plain_loss) == pytest.approx(6 * COEF * value / 10, rel=1e-4)
    assert torch.equal(objective(kl_in_loss=kind, kl_coef=0.0)[1], plain)


def test_statistics_are_means_over_the_trained_tokens_of_the_step() -> None:
    _, _, stats = objective()
    found = {name: float(value) for name, value in stats.items()}
    assert found == pytest.approx(
        {
            "ratio": 6 / 10,  # 6 of the step's 10 tokens are here
            "clip_frac": 0.0,
            "entropy": 0.6 * 0.7,
            "approx_kl": 0.0,
            # KL(sampler || trainer) by the sampler's tokens: log sampler - log trainer.
            "sampler_kl": -(2 * math.log(1.5) + 4 * math.log(3.0)) / 10,
            "sampler_gap": (2 * math.log(1.5) + 4 * math.log(3.0)) / 10,
            "importance_weight": (2 * 1.5 + 4 * 2.0) / 10,
            "importance_bounded": 4 / 10,
        },
        abs=1e-6,
    )


def test_approximate_kl_is_that_of_the_old_policy_to_the_current_one() -> None:
    """The mean of r - 1 - log r over tokens of the old policy, r = current / old."""
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    new = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    exact = float((old * (old / new).log()).sum())
    mean = 0.0
    for p, q in zip(old.tolist(), new.tolist(), strict=True):
        rows = [TokenRow((3, 4), (False, True))]
        flat = [[0.0, math.log(p)]]
        batch = pack(
            rows,
            counts={"tokens": 1.0, "answers": 1.0},
            per_token={"old_logprobs": flat, "rollout_logprobs": flat, "advantages": [[0.0, 0.0]]},
        )
        logprobs = torch.tensor([[0.0, math.log(q)]])

        def model(*_: Tensor, logprobs: Tensor = logprobs, **__: Any) -> Any:
            return SimpleNamespace(logprobs=logprobs, entropy=logprobs)

        _, stats = policy_objective(
            model,  # type: ignore[arg-type]
            batch,
            kl_coef=0.0,
            temperature=1.0,
            objective="clip",
            clip={"clip_low": 0.2, "clip_high": 0.2},
            dual_clip=3.0,
            importance={"mode": "none", "cap": 2.0, "level": "token"},
            kl_in_loss=None,
            aggregation="token",
            max_tokens=8,
        )
        mean += p * float(stats["approx_kl"])
    assert mean == pytest.approx(exact, rel=1e-5)


def test_dual_clip_reaches_the_loss() -> None:
    """At ratio 4 and advantage -0.5 the loss is 3 x 0.5 in place of 4 x 0.5, without gradient."""
    batch = laid_out()
    old = batch.per_token["old_logprobs"]
    logprobs = (old + math.log(4.0)).requires_grad_()

    def model(*_: Tensor, **__: Any) -> Any:
        return SimpleNamespace(logprobs=logprobs, entropy=logprobs)

    loss, _ = policy_objective(
        model,  # type: ignore[arg-type]
        batch,
        kl_coef=0.0,
        temperature=1.0,
        objective="clip",
        clip={"clip_low": 0.2, "clip_high": 0.2},
        dual_clip=3.0,
        importance={"mode": "none", "cap": 2.0, "level": "token"},
        kl_in_loss=None,
        aggregation="token",
        max_tokens=8,
    )
    # The first response is clipped at 1.2: -1.2 x 1.5 on 2 tokens.
    assert loss.item() == pytest.approx((4 * 3.0 * 0.5 - 2 * 1.2 * 1.5) / 10)
