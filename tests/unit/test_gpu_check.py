"""The checks of scripts/gpu_check.sh: they load, and their arithmetic is right."""

import importlib
import math
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

import benchmarks.gpu

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
MODULES = sorted(m.name for m in pkgutil.iter_modules(benchmarks.gpu.__path__))


def test_script_is_valid_bash_and_runs_every_check():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    started = set(re.findall(r"^ *module \w+ \d+ (\w+)", SCRIPT.read_text(), re.MULTILINE))
    assert started == set(MODULES) - {"common"}


@pytest.mark.parametrize("name", MODULES)
def test_check_loads(name):
    assert importlib.import_module(f"benchmarks.gpu.{name}").__doc__


def test_training_flops_of_one_sequence_by_hand():
    from benchmarks.gpu.common import training_flops

    # tiny: 2 layers, hidden 64, 2 heads of 32, 1 key head, MLP 128, vocabulary 128; 10 tokens.
    projections = 2 * (64 * 64 + 64 * 32 + 64 * 32 + 64 * 64)  # q, k, v, o
    mlp = 2 * 3 * 64 * 128
    attention = 2 * 10 * 10 * 64  # scores and values, 2 FLOPs each, half of them causal
    head = 2 * 4 * 64 * 128
    expected = 3 * (2 * (10 * (projections + mlp) + attention) + head)
    assert training_flops("tiny", [10], 4) == pytest.approx(expected)


def test_model_utilization_is_unknown_without_a_known_card(monkeypatch):
    from benchmarks.gpu import common

    monkeypatch.setattr(common, "DEVICE", common.torch.device("cpu"))
    assert math.isnan(common.model_utilization(1e12))
