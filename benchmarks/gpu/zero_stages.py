"""Run three optimizer steps with the Learner under every ZeRO stage, in float32 and bfloat16."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align.core import distributed
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import OptimSpec, ZeroSpec
from align.training.learner import Learner
from benchmarks.gpu.common import failure, make_run, result


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean negative log-probability of the batch."""
    return -model(*batch).logprobs.mean(), {}


def main() -> None:
    """Print first and last loss of each combination, or how it failed."""
    logging.disable(logging.WARNING)
    distributed.init_process_group()
    device = distributed.device()
    result(backend=dist.get_backend(), device=device)
    folder = make_run("tiny") / "base" / "model"
    ids = torch.randint(2, 100, (1, 512), device=device)
    positions = torch.arange(512, device=device).unsqueeze(0)
    for dtype in ("float32", "bfloat16"):
        for stage in (0, 1, 2, 3):
            try:
                learner = Learner(
                    LogprobModel(load_policy(folder, dtype=dtype)),
                    optim=OptimSpec(learning_rate=1e-3),
                    zero=ZeroSpec(stage=stage),
                    dtype=dtype,
                    total_steps=9,
                )
                losses = [learner.step([(ids, positions)] * 2, loss)["loss"] for _ in range(3)]
                found = (
                    f"{losses[0]:.4f}>{losses[-1]:.4f}/{type(learner.engine.optimizer).__name__}"
                )
            except Exception as error:  # the next combination is worth a try whatever failed
                found = failure(error)
            result(**{f"{dtype}_zero{stage}": found})


if __name__ == "__main__":
    main()
