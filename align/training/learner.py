"""The Learner: one model, one optimiser, and the only code that drives DeepSpeed.

Normalisation: a loss function divides its local sum by the *global* count (all ranks, all
micro-batches of the optimiser step). DeepSpeed averages gradients over ranks, so the Learner
multiplies by the world size, once, and nothing else is scaled.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import deepspeed
import torch
from torch import Tensor, nn

from align.core import distributed
from align.core.errors import TrainingError
from align.recipe.deepspeed import deepspeed_config
from align.recipe.schema import OptimSpec, ZeroSpec
from align.training.schedule import learning_rate

log = logging.getLogger(__name__)
Micro = TypeVar("Micro")
LossFunction = Callable[[nn.Module, Micro], tuple[Tensor, Mapping[str, Tensor]]]
"""(model, micro-batch) -> this micro-batch's share of the loss and of each statistic."""


class Learner:
    """Hold a model under DeepSpeed and take optimiser steps on it."""

    def __init__(
        self,
        module: nn.Module,
        *,
        optim: OptimSpec,
        zero: ZeroSpec,
        dtype: str,
        total_steps: int,
    ) -> None:
        """Hand ``module`` to DeepSpeed.

        Args:
            module: its forward is what the loss functions call.
            optim: optimiser and schedule. zero: how state is sharded. dtype: of the weights.
            total_steps: length of the learning-rate schedule, in optimiser steps.
        """
        self.optim, self.total_steps, self.steps = optim, total_steps, 0
        optimizer, groups = _adamw(module, optim, zero)
        self.engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=groups if optimizer is None else None,
            config=_with_optimizer(deepspeed_config(zero, optim, dtype=dtype), optim, optimizer),
            dist_init_required=False,
        )
        if dtype == "bfloat16" and zero.stage == 0:
            # This wrapper makes its state by a step on zero gradients, which Adam would count.
            self._optimizer.optimizer.state.clear()
        # DeepSpeed clips fp32 gradients without ZeRO but does not say their norm.
        self.engine.clip_fp32_gradients = self._clip
        self._norm = 0.0

    @property
    def module(self) -> nn.Module:
        """Give the bare module inside the engine."""
        return self.engine.module

    def step(self, micro_batches: Sequence[Micro], loss_fn: LossFunction) -> dict[str, float]:
        """Take one optimiser step over ``micro_batches``; every rank passes the same number.

        Returns:
            The global sum of every statistic of ``loss_fn``, with ``loss``, ``grad_norm`` and
            ``learning_rate``.

        Raises:
            TrainingError: a loss is not finite, on whichever rank; no rank has then stepped.
        """
        self.engine.train()
        rate = learning_rate(self.optim, self.steps, self.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        totals: dict[str, Tensor] = {}
        for micro in micro_batches:
            loss, stats = loss_fn(self.engine, micro)
            self.engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)
            for name, value in {"loss": loss, **stats}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
        sums = distributed.global_sums({k: float(v) for k, v in totals.items()})
        if not math.isfinite(sums["loss"]):
            raise TrainingError(
                f"optimiser step {self.steps + 1}: the loss is {sums['loss']}, expected a finite "
                "number; no weight was changed. Lower the learning rate or look at the batch"
            )
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or self._norm)
        self._check_norm(norm)
        self.steps += 1
        return {**sums, "grad_norm": norm, "learning_rate": rate}

    def _clip(self) -> None:
        limit = self.optim.max_grad_norm
        self._norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        self._check_norm(self._norm)

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise TrainingError(
                f"optimiser step {self.steps + 1}: the gradient norm is {norm}, expected a finite "
                "number; nothing of this step is saved. Lower the learning rate"
            )

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Micro], loss_fn: LossFunction) -> dict[str, float]:
        """Give the global sums of ``loss_fn`` without training, dropout off."""
        self.engine.eval()
        totals: dict[str, float] = {}
        for micro in micro_batches:
            loss, stats = loss_fn(self.engine, micro)
            for name, value in {"loss": loss, **stats}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return distributed.global_sums(totals)

    @torch.no_grad()
    def infer(self, micro_batches: Iterable[Micro], fn: Callable[[nn.Module, Micro], Any]) -> list:
        """Apply ``fn(model, micro-batch)`` without gradient, dropout off; results in order."""
        self.engine.eval()
        return [fn(self.engine, micro) for micro in micro_batches]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Say whether weight decay applies: to matrices, not to biases, norms and scalars.

    ZeRO-3 shows every parameter as one-dimensional; its true shape is ``ds_shape``.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and not name.endswith("bias") and "norm" not in name.lower()


def _adamw(
    module: nn.Module, optim: OptimSpec, zero: ZeroSpec
) -> tuple[torch.optim.Optimizer | None, list[dict[str, Any]]]:
    trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not trained:
        raise TrainingError("no parameter is trainable; expected at least one (check 'tuning')")
    groups = [
        {"params": [p for n, p in trained if decays(n, p)], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if zero.offload == "cpu":
        return None, groups
    # The Learner sets the rate before each step; 0 keeps any step before that without effect.
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, foreach=False)
    return adamw, groups


def _with_optimizer(
    config: dict[str, Any], optim: OptimSpec, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    if optimizer is not None:
        return config
    # Offloading needs DeepSpeed's own CPU Adam, which it builds from the configuration.
    params = {"lr": optim.learning_rate, "betas": list(optim.betas), "eps": optim.eps}
    return {**config, "optimizer": {"type": "AdamW", "params": params}}
