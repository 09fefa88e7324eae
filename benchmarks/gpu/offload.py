"""Check that ZeRO-2 with the optimizer on the host works: DeepSpeed compiles its CPU Adam."""

import logging
import time

import torch

from align.core import distributed
from align.models.loading import load_policy
from align.models.logprobs import LogprobModel
from align.recipe.schema import OptimSpec, ZeroSpec
from align.training.learner import Learner
from benchmarks.gpu.common import SMOKE, make_run, peak_gib, result, synchronize
from benchmarks.gpu.zero_stages import loss


def main() -> None:
    """Print seconds to start (with compilation) and seconds of the third step."""
    logging.disable(logging.WARNING)
    distributed.init_process_group()
    device = distributed.device()
    folder = make_run("tiny" if SMOKE else "0.5B") / "base" / "model"
    began = time.perf_counter()
    learner = Learner(
        LogprobModel(load_policy(folder, dtype="bfloat16")),
        optim=OptimSpec(),
        zero=ZeroSpec(stage=2, offload="cpu"),
        dtype="bfloat16",
        total_steps=9,
    )
    start_s = time.perf_counter() - began
    ids = torch.randint(2, 100, (1, 2048), device=device)
    positions = torch.arange(2048, device=device).unsqueeze(0)
    seconds = 0.0
    for _ in range(3):
        began = time.perf_counter()
        learner.step([(ids, positions)], loss)
        synchronize()
        seconds = time.perf_counter() - began
    result(start_s=start_s, s_step=seconds, gib=peak_gib(), threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
