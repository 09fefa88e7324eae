"""Elastic weight consolidation: pull weights that an old task needs back to their start."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from align.core import distributed
from align.core.errors import DataError

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Anchor:
    """The start of the weights and how much the old task needs each of them.

    Attributes:
        coef: the coefficient lambda.
        start: weights at the start of the stage, float32, by name.
        fisher: diagonal Fisher information by name, scaled and capped (see ``scaled``).
    """

    coef: float
    start: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]

    def penalty(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Tensor:
        """Return coef / 2 * sum of F * (w - w_start)^2 over the currently trained parameters.

        Reference:
            arXiv:1612.00796 eq. 3.
        """
        # A sum of F * (w - w_start)^2 in float32, since differences of bfloat16 weights vanish.
        total = torch.zeros((), device=distributed.device())
        for name, parameter in parameters:
            if parameter.requires_grad and name in self.fisher:
                moved = parameter.float() - self.start[name]
                total = total + (self.fisher[name] * moved * moved).sum()
        return 0.5 * self.coef * total

    def pull(self, name: str, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return one whole weight's part of the penalty and of its gradient, at ``value``."""
        moved = value.float() - self.start[name]
        # d/dw of coef / 2 * F * (w - w_start)^2
        gradient = self.coef * self.fisher[name] * moved
        return 0.5 * (gradient * moved).sum(), gradient


def fisher_diagonal(
    module: nn.Module, rows: Sequence[Row], log_likelihood: Callable[[nn.Module, Row], Tensor]
) -> dict[str, Tensor]:
    """Return the mean squared gradient of each row's log-likelihood, with dropout off.

    This is the empirical Fisher information: labels come from the data, and gradients are squared
    row by row (squaring the gradient of a batch would cancel the differences between its rows).

    Args:
        module: model with trainable parameters, not yet under DeepSpeed.
        rows: rows of the old task; each rank processes a part of them.
        log_likelihood: (module, row) -> sum over the trained tokens, in nats.

    Returns:
        float32 tensors by parameter name, on every rank.
    """
    module.eval()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    for row in distributed.shard(rows):
        found = torch.autograd.grad(
            log_likelihood(module, row), list(trained.values()), allow_unused=True
        )
        for name, gradient in zip(trained, found, strict=True):
            if gradient is not None:
                # Row by row: the square of a sum of gradients would be another number.
                totals[name] += gradient.float().square()
    # Every rank divides the global sum by the total number of rows.
    for total in totals.values():
        distributed.sum_in_place(total).div_(len(rows))
    return totals


def scaled(fisher: Mapping[str, Tensor], *, cap: float) -> dict[str, Tensor]:
    """Divide by the mean over all weights, then cap each value at ``cap``.

    At the optimum of the old task gradients nearly vanish, so without scaling no lambda has an
    effect. Without the cap, a few weights contain almost all of the information.

    Raises:
        DataError: the information is 0 or not finite everywhere.
    """
    # Scale to mean 1, so that lambda means the same for every model and task.
    count = sum(x.numel() for x in fisher.values())
    mean = sum(float(x.double().sum()) for x in fisher.values()) / max(count, 1)
    if not 0.0 < mean < float("inf"):
        raise DataError(
            f"keep.ewc.data: the mean Fisher information of its rows is {mean}, expected a finite "
            "number above 0. Use rows of the old task with responses to train on."
        )
    return {name: (x / mean).clamp(max=cap) for name, x in fisher.items()}


def anchor_at(module: nn.Module, fisher: Mapping[str, Tensor], *, coef: float) -> Anchor:
    """Return an anchor at the current weights of ``module``."""
    named = dict(module.named_parameters())
    start = {name: named[name].detach().float().clone() for name in fisher}
    return Anchor(coef, start, fisher)
