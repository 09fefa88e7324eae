"""Measure the error of a gradient accumulated over 64 micro-batches against float32."""

import logging
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from align.core import distributed
from align.recipe.schema import OptimSpec, ZeroSpec
from align.training.deepspeed import deepspeed_config
from benchmarks.gpu.common import DEVICE, SMOKE, failure, result

SIZE = 64 if SMOKE else 1024
NUM_BATCHES = 64
BF16 = {"data_types": {"grad_accum_dtype": "bf16"}}
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    *((f"align_zero{stage}", stage, {}) for stage in range(4)),
    ("bf16_zero2", 2, BF16),
)
"""Name, ZeRO stage, and what replaces align's own setting."""


def make_model() -> nn.Module:
    """Return two bf16 layers, the same each time."""
    torch.manual_seed(1)
    layers = (nn.Linear(SIZE, SIZE, bias=False), nn.Tanh(), nn.Linear(SIZE, SIZE, bias=False))
    return nn.Sequential(*layers).bfloat16().to(DEVICE)


def make_batches() -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches, the same each time."""
    source = torch.Generator(DEVICE).manual_seed(2)

    def draw() -> Tensor:
        return torch.randn(32, SIZE, generator=source, device=DEVICE).bfloat16()

    return [(draw(), draw()) for _ in range(NUM_BATCHES)]


def share(output: Tensor, wanted: Tensor) -> Tensor:
    """Return a micro-batch's part of the mean squared error."""
    return ((output - wanted).float() ** 2).mean() / NUM_BATCHES


def exact_gradient() -> Tensor:
    """Sum the gradients of the first layer in float32."""
    total = torch.zeros(SIZE, SIZE, device=DEVICE)
    for x, y in make_batches():
        model = make_model()
        share(model(x), y).backward()
        gradient = next(model.parameters()).grad
        assert gradient is not None
        total += gradient.float()
    return total


def accumulated_gradient(stage: int, extra: dict[str, Any]) -> Tensor:
    """Accumulate the same gradient with DeepSpeed."""
    model = make_model()
    config = deepspeed_config(ZeroSpec(stage=stage), OptimSpec(max_grad_norm=1e9), dtype="bfloat16")
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.0),
        config=config | extra,
        dist_init_required=False,
    )
    for x, y in make_batches():
        engine.backward(share(engine(x), y), scale_wrt_gas=False)
    if not extra:
        gradient = deepspeed.utils.safe_get_full_grad(next(engine.module.parameters()))
        assert gradient is not None
        return gradient.float()
    engine.optimizer.finalize_gradient_accumulation_boundary()
    return engine.optimizer.averaged_gradients[0][0].float().view(SIZE, SIZE)


def main() -> None:
    """Print the relative error of each setting."""
    logging.disable(logging.WARNING)
    distributed.init_process_group()
    exact = exact_gradient()
    for name, stage, extra in CASES:
        try:
            found = accumulated_gradient(stage, extra)
            result(**{name: float((found - exact).norm() / exact.norm())})
        except Exception as error:  # which settings DeepSpeed takes is what is asked
            result(**{name: failure(error)})


if __name__ == "__main__":
    main()
