"""What bfloat16 weights must not round, and what DeepSpeed must not print for them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import alone

from align.recipe.schema import OptimSpec, ZeroSpec
from align.training.learner import Learner
from benchmarks.gpu import accumulation


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Join a world of one, and let the check run on the CPU."""
    monkeypatch.setattr(accumulation, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(accumulation, "SIZE", 32)
    with alone.world_of_one():
        yield


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_of_64_micro_batches_is_summed_in_float32(stage: int) -> None:
    exact = accumulation.exact_gradient()
    found = accumulation.accumulated_gradient(stage, {})
    # Summed in bfloat16 it is off by 8e-3.
    assert float((found - exact).norm() / exact.norm()) < 1e-6


def test_a_learner_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    module = torch.nn.Linear(4, 2, dtype=torch.bfloat16)
    Learner(module, optim=OptimSpec(), zero=ZeroSpec(), dtype="bfloat16", total_steps=1)
    assert capsys.readouterr().out == ""
