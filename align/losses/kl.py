"""Per-token KL estimates against the reference policy, and controllers of the KL coefficient."""

# ruff: noqa: F722 - jaxtyping writes shapes as strings; they are not forward references
import math

import torch
from jaxtyping import Float
from torch import Tensor

from align.core.errors import TrainingError


def kl_estimate(
    logprobs: Float[Tensor, "*S"], ref_logprobs: Float[Tensor, "*S"], kind: str
) -> Float[Tensor, "*S"]:
    """Estimate KL(policy || reference) in nats at each token sampled from the policy.

    With x = logprobs - ref_logprobs: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x. Nothing is
    clamped. As values k1 and k3 are unbiased and k3 is never negative. As a loss the expected
    gradient of k1 is 0, that of k2 is the gradient of KL(policy || reference), and that of k3 the
    gradient of KL(reference || policy).

    Args:
        logprobs: log-probabilities under the policy.
        ref_logprobs: log-probabilities of the same tokens under the reference.
        kind: k1, k2 or k3.

    Returns:
        One estimate per token, with the gradient of ``logprobs``.

    Reference:
        Schulman 2020, joschu.net/blog/kl-approx.
    """
    assert kind in ("k1", "k2", "k3"), f"unknown KL estimator {kind!r}"
    # x = log(policy / reference) at the sampled token. Only the policy is trained.
    x = logprobs - ref_logprobs.detach()
    if kind == "k1":
        return x
    if kind == "k2":
        return 0.5 * x.square()
    # expm1 keeps k3 >= 0 where the two policies nearly agree.
    return torch.expm1(-x) + x


def corrected_kl(
    logprobs: Float[Tensor, "*S"],
    old_logprobs: Float[Tensor, "*S"],
    ref_logprobs: Float[Tensor, "*S"],
) -> Float[Tensor, "*S"]:
    """Estimate KL(policy || reference) at tokens sampled from an older policy, as a loss.

    (policy / old) * k3, with gradient through the ratio: over samples of the old policy both its
    mean and its expected gradient are those of KL(policy || reference).

    Args:
        logprobs: log-probabilities under the policy being trained.
        old_logprobs: the same tokens under the policy that sampled them.
        ref_logprobs: the same tokens under the reference.

    Returns:
        One estimate per token, with the gradient of ``logprobs``.

    Reference:
        arXiv:2512.02556 section 3.1. Deviation: the log-ratio is clamped to +-20 nats.
    """
    # Importance weight policy / old: the samples come from the old policy.
    ratio = (logprobs - old_logprobs.detach()).clamp(-20.0, 20.0).exp()
    # The ratio keeps its gradient: the expected gradient is wrong without it.
    return ratio * kl_estimate(logprobs, ref_logprobs, "k3")


class FixedKL:
    """KL coefficient that never changes."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, num_samples: int) -> None:
        """Do nothing; the coefficient is constant."""

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the coefficient from a checkpoint."""
        self.coef = float(state["coef"])


class AdaptiveKL:
    """KL coefficient that is adjusted until the measured KL reaches a target.

    coef <- coef * (1 + clip(KL / target - 1, -0.2, 0.2) * num_samples / horizon)

    Args:
        coef: starting coefficient, > 0.
        target: KL to aim at, in the unit of the KL passed to `update` (nats).
        horizon: samples over which the coefficient can change by up to 20 %.

    Reference:
        arXiv:1909.08593 section 2.2. Deviation: num_samples / horizon is at most 1, so that the
        coefficient stays positive however large a batch is.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        assert min(coef, target, horizon) > 0.0, (coef, target, horizon)
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Adjust the coefficient to a KL of ``kl`` (global mean) over ``num_samples`` responses.

        Raises:
            TrainingError: the KL is not finite.
        """
        if not math.isfinite(kl):
            raise TrainingError(
                f"adaptive KL controller: measured KL is {kl}, expected a finite number. "
                "Lower the learning rate or raise kl.coef"
            )
        # Proportional control, arXiv:1909.08593: the error is clipped so that one batch moves the
        # coefficient by at most 20 %.
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * min(num_samples / self.horizon, 1.0)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the coefficient; target and horizon come from the recipe."""
        self.coef = float(state["coef"])
