"""The recorded curves: a change that moves them must say so by recording them anew.

The bound is 2e-4 of a curve's largest value. Measured on one machine: other kernels for the same
float32 arithmetic (ATEN_CPU_CAPABILITY=default; avx2 with MKL_CBWR=COMPATIBLE), as another CPU
would use, move a curve by at most 1.5e-5. Real changes move it by far more: the 1e-4 beside a
group's standard deviation made 1e-6 moves grpo by 1.3e-3, one token more in sft's denominator 3e-2,
the sample variance in PPO's whitening 2.6e-2, lambda 0.96 for 0.95 1.1e-1.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import curves
from curves import alone, save_tiny, tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Save a tiny policy and join a world of one."""
    with alone.world_of_one():
        yield save_tiny(tiny_model(1, tied=True), tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("name", curves.CURVES)
def test_curve_is_the_recorded_one(model_dir: Path, name: str) -> None:
    found, expected = curves.CURVES[name](model_dir), curves.recorded(name)
    assert [len(values) for values in found.values()] == [curves.STEPS] * len(expected)
    assert curves.distance(found, expected) < 2e-4, (
        f"the {name} curve has moved; if that is meant, record it: python tests/golden/curves.py"
    )
