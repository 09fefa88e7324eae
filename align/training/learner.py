"""The Learner: one model with one optimizer, and the only code that calls DeepSpeed.

Normalization: a loss function divides its local sum by the *global* count (all ranks, all
micro-batches of the optimizer step). DeepSpeed averages gradients over ranks, so the Learner
multiplies the loss by the world size once. Nothing else is scaled.
"""

import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar, cast

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_grad
from torch import Tensor, nn

from align.core import distributed
from align.core.errors import TrainingError
from align.models.sharding import hand_over
from align.recipe.schema import LayersSpec, OptimSpec, ZeroSpec
from align.training.deepspeed import deepspeed_config, effective_stage, with_cpu_adam
from align.training.idle_states import Parking, optimizer_tensors
from align.training.layers import LayerPlan, plan_layers, set_trainable
from align.training.probe import WeightProbe
from align.tuning.ewc import Anchor


def learning_rate(optim: OptimSpec, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0) out of ``total_steps``.

    Linear warm-up over ``warmup_frac`` of the steps (step 0 already moves), then constant, linear
    or cosine decay that reaches ``min_lr_frac`` of the peak after the last step.

    ``slanted`` is ULMFiT's triangle: a linear rise from 1 / ``ratio`` of the peak over the first
    ``cut_frac`` of the steps, then a linear fall that reaches 1 / ``ratio`` after the last step.

    Reference:
        arXiv:1801.06146 eq. 3. Deviation: the paper's fall takes ``cut * (1 / cut_frac - 1)``
        steps, which misses the last step when ``cut`` is rounded; here it takes all that remain.
    """
    if optim.schedule == "slanted":
        return optim.learning_rate * _slanted(optim, step, total_steps)
    # Step 0 already has a rate above 0: a first step that changes nothing would be wasted.
    warmup = round(optim.warmup_frac * total_steps)
    if step < warmup:
        return optim.learning_rate * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if optim.schedule == "constant":
        share = 1.0
    elif optim.schedule == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    floor = optim.min_lr_frac
    return optim.learning_rate * (floor + (1.0 - floor) * share)


def _slanted(optim: OptimSpec, step: int, total_steps: int) -> float:
    # arXiv:1801.06146 eq. 3: share is p, the rate (1 + p (ratio - 1)) / ratio.
    cut = max(1, math.floor(optim.cut_frac * total_steps))
    share = step / cut if step < cut else 1.0 - (step - cut) / max(1, total_steps - cut)
    return (1.0 + max(0.0, share) * (optim.ratio - 1.0)) / optim.ratio


log = logging.getLogger(__name__)
Micro = TypeVar("Micro")
LossFunction = Callable[[nn.Module, Micro], tuple[Tensor, Mapping[str, Tensor]]]
"""(model, micro-batch) -> this micro-batch's share of the loss and of each statistic."""


class Learner:
    """A model under DeepSpeed, trained one optimizer step at a time."""

    def __init__(
        self,
        module: nn.Module,
        *,
        optim: OptimSpec,
        zero: ZeroSpec,
        dtype: str,
        total_steps: int,
        layers: LayersSpec | None = None,
        anchor: Anchor | None = None,
    ) -> None:
        """Wrap ``module`` in a DeepSpeed engine.

        Args:
            module: the model; the loss functions call its forward.
            optim: optimizer and schedule. zero: how state is sharded. dtype: of the weights.
            total_steps: length of the learning-rate schedule, in optimizer steps.
            layers: which layers train when and how fast; None trains all alike.
            anchor: weights of the EWC penalty; None adds no penalty.
        """
        self.anchor, self._zero_stage = anchor, effective_stage(zero, dtype=dtype)
        self.optim, self.total_steps, self.steps = optim, total_steps, 0
        # Layer plan and parameter groups: one group per layer and weight-decay setting.
        self._plan: LayerPlan | None = None
        if layers is not None:
            names = [name for name, _ in module.named_parameters()]
            self._plan = plan_layers(layers, names, total_steps=total_steps)
        trained = _trained(module, self._plan)
        self._trained = [(depth, p) for depth, _, p in trained]
        groups, self._depths = _groups(trained, optim)
        optimizer = _adamw(groups, optim, zero)
        hand_over(module)
        # The engine. Offloading builds DeepSpeed's own CPU Adam instead of ours.
        plain = deepspeed_config(zero, optim, dtype=dtype)
        self.engine: Any
        self._optimizer: Any
        with redirect_stdout(io.StringIO()):  # in bfloat16 it prints the memory in use
            self.engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                model_parameters=cast("Any", groups if optimizer is None else None),
                config=plain if optimizer is not None else with_cpu_adam(plain, optim),
                dist_init_required=False,
            )
        moving = [p for depth, p in self._trained if self._moves(depth)]
        self.num_trained = sum(getattr(p, "ds_numel", p.numel()) for p in moving)
        self._probe = WeightProbe(moving, sharded=self._zero_stage == 3)
        # Without ZeRO, DeepSpeed clips fp32 gradients but does not report their norm.
        self.engine.clip_fp32_gradients = self._clip
        self._norm, self._parking = 0.0, Parking()

    @property
    def module(self) -> Any:
        """Return the module inside the engine."""
        return self.engine.module

    def _moves(self, depth: int) -> bool:
        """Return whether the plan ever trains the weights of a layer."""
        return self._plan is None or self._plan.thaw_step(depth) is not None

    def step(self, micro_batches: Sequence[Micro], loss_fn: LossFunction) -> dict[str, float]:
        """Run one optimizer step over ``micro_batches``; every rank passes the same number of them.

        Returns:
            The global sum of every statistic of ``loss_fn``, with ``loss``, ``grad_norm``,
            ``learning_rate`` and the movement of the weights (see ``WeightProbe.movement``).

        Raises:
            TrainingError: a loss is not finite on some rank. No rank has stepped then.
        """
        self.engine.train()
        rate = learning_rate(self.optim, self.steps, self.total_steps)
        self._set_layers(rate)
        totals: dict[str, Tensor] = {}
        # Forward and backward of each micro-batch; gradients add up until engine.step().
        for micro in micro_batches:
            loss, stats = loss_fn(self.engine, micro)
            # Once per optimizer step, with the first micro-batch.
            if self.anchor is not None and not totals and self._zero_stage < 3:
                penalty = self.anchor.penalty(self.module.named_parameters())
                penalty = penalty / distributed.world_size()  # summed over ranks below
                loss, stats = loss + penalty, {**stats, "ewc": penalty}
            # DeepSpeed averages over ranks, but the losses are parts of a global mean: undo the
            # division.
            self.engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)
            for name, value in {"loss": loss, **stats}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().double()
        # One collective for all statistics, and the first wait for the GPU in this step.
        sums = distributed.global_sums({k: float(v) for k, v in totals.items()})
        if not math.isfinite(sums["loss"]):
            raise TrainingError(
                f"optimizer step {self.steps + 1}: the loss is {sums['loss']}, expected a finite "
                "number; no weight was changed. Lower the learning rate or inspect the batch"
            )
        if self.anchor is not None and self._zero_stage == 3:
            sums["ewc"] = self._pull_whole(self.anchor)
            sums["loss"] += sums["ewc"]
        before = self._probe.read()
        self.engine.step()
        # Outside ZeRO and bf16, DeepSpeed reports no norm; then _clip has stored it.
        norm = float(self.engine.get_global_grad_norm() or self._norm)
        self._check_norm(norm)
        self.steps += 1
        moved = self._probe.movement(before, rate=rate)
        return {**sums, "grad_norm": norm, "learning_rate": rate, **moved}

    def _pull_whole(self, anchor: Anchor) -> float:
        """Add the gradient of the EWC penalty, weight by weight, and return the penalty.

        Under ZeRO-3 no weight is complete while the loss is computed.
        """
        total = 0.0
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad and name in anchor.fisher:
                weight: Any = safe_get_full_fp32_param(parameter)
                penalty, gradient = anchor.pull(name, weight)
                # A collective call: every rank gathers the weights in the same order.
                full: Any = safe_get_full_grad(parameter)
                safe_set_full_grad(parameter, full + gradient)
                total += float(penalty)
        return total

    def _set_layers(self, rate: float) -> None:
        """Set the learning rate of every group; freeze and unfreeze layers by the plan."""
        for i, (group, depth) in enumerate(
            zip(self._optimizer.param_groups, self._depths, strict=True)
        ):
            if self._plan is None:
                group["lr"] = rate
                continue
            group["lr"] = rate * self._plan.share(depth, self.steps)
            if self.steps and self._plan.thaw_step(depth) == self.steps:
                self._restart_adam(i)
        if self._plan is not None:
            set_trainable(self._trained, self._plan, self.steps)

    def _restart_adam(self, group: int) -> None:
        """Restart Adam's step count for a group that was just unfrozen.

        ZeRO steps a frozen shard on zero gradients at rate 0. Its moments stay 0, but its step
        count grows, so the bias correction would differ from a run without ZeRO.
        """
        # ZeRO wraps the optimizer; plain training has only the inner one.
        outer: Any = self._optimizer
        inner = getattr(outer, "optimizer", outer)
        params = inner.param_groups[group]["params"]
        if hasattr(outer, "fp32_partitioned_groups_flat"):  # ZeRO-3
            numbers, flat = outer.sub_group_to_group_id, outer.fp32_partitioned_groups_flat
            params = [flat[i] for i, number in numbers.items() if number == group]
        for state in (inner.state[p] for p in params if p in inner.state):
            step = state.get("step", 0)
            state["step"] = torch.zeros_like(step) if isinstance(step, Tensor) else 0

    def _clip(self) -> None:
        limit = self.optim.max_grad_norm
        self._norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        self._check_norm(self._norm)

    def _check_norm(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise TrainingError(
                f"optimizer step {self.steps + 1}: the gradient norm is {norm}, expected a finite "
                "number; this step was not saved. Lower the learning rate"
            )

    @contextmanager
    def optimizer_on_cpu(self) -> Iterator[None]:
        """Keep the optimizer's states in CPU memory inside the block, in which no step is taken.

        With ``zero.offload: cpu`` they are there already.
        """
        there = optimizer_tensors(self._optimizer, self.module)
        with self._parking.parked(x for x in there if x.device.type != "cpu"):
            yield

    def infer(self, micro_batches: Iterable[Micro], fn: Callable[[nn.Module, Micro], Any]) -> list:
        """Apply ``fn(model, micro-batch)`` without gradient, dropout off; results in order."""
        return infer(self.engine, micro_batches, fn)


@torch.no_grad()
def evaluate(
    model: nn.Module, micro_batches: Iterable[Micro], loss_fn: LossFunction
) -> dict[str, float]:
    """Return the global sums of ``loss_fn`` for any model, dropout off."""
    model.eval()
    totals: dict[str, float] = {}
    for micro in micro_batches:
        loss, stats = loss_fn(model, micro)
        for name, value in {"loss": loss, **stats}.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return distributed.global_sums(totals)


@torch.no_grad()
def infer(
    model: nn.Module, micro_batches: Iterable[Micro], fn: Callable[[nn.Module, Micro], Any]
) -> list:
    """Apply ``fn(model, micro-batch)`` without gradient, dropout off; results in order."""
    model.eval()
    return [fn(model, micro) for micro in micro_batches]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices, not to biases, norms and scalings.

    ZeRO-3 flattens every parameter; its original shape is ``ds_shape``. IA3's vectors of shape
    (1, n) are factors: 1 leaves the model unchanged, and decay would pull them to 0.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and not (
        name.endswith("bias") or "norm" in name.lower() or ".ia3_l." in name
    )


def _trained(module: nn.Module, plan: LayerPlan | None) -> list[tuple[int, str, nn.Parameter]]:
    """Return (layer, name, parameter) of every parameter with ``requires_grad``."""
    found = [
        (0 if plan is None else plan.depth(name), name, p)
        for name, p in module.named_parameters()
        if p.requires_grad
    ]
    if not any(plan is None or plan.thaw_step(depth) is not None for depth, _, _ in found):
        raise TrainingError(
            "no parameter is trainable; expected at least one. Check 'tuning' and 'layers'"
        )
    return found


def _groups(
    trained: Sequence[tuple[int, str, nn.Parameter]], optim: OptimSpec
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return parameter groups by layer and weight decay, and the layer of each group."""
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    # A fixed order, since optimizer states in a checkpoint are matched by position.
    for depth in sorted({depth for depth, _, _ in trained}):
        for decay in (True, False):
            params = [p for d, name, p in trained if (d, decays(name, p)) == (depth, decay)]
            if params:
                found[depth, decay] = params
    groups = [
        {"params": params, "weight_decay": optim.weight_decay if decay else 0.0}
        for (_, decay), params in found.items()
    ]
    return groups, [depth for depth, _ in found]


def _adamw(
    groups: list[dict[str, Any]], optim: OptimSpec, zero: ZeroSpec
) -> torch.optim.Optimizer | None:
    if zero.offload == "cpu":
        return None
    # The Learner sets the rate before each step; with 0, an earlier step would have no effect.
    fused = True if distributed.device().type == "cuda" else None
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=optim.betas,
        eps=optim.eps,
        # On the CPU, foreach would only allocate temporary copies of all weights.
        foreach=False if fused is None else None,
        fused=fused,
    )
