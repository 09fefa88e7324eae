"""Faults planted in pushes at learning rate 1e-7: each is found, valid pushes raise no alarm."""

import importlib.util

import pytest

from benchmarks.push_faults import noticed_by, run_setup
from benchmarks.push_kinds import FAULTS, Setup

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("setup", "least"),
    [
        (Setup("hf", "float32"), 35),
        (Setup("hf", "bfloat16"), 33),
        pytest.param(Setup("vllm", "float32"), 46, marks=needs_vllm),
        pytest.param(Setup("vllm", "bfloat16"), 44, marks=[needs_vllm, slow]),
        pytest.param(Setup("vllm", "float32", tied=False), 48, marks=[needs_vllm, slow]),
        pytest.param(Setup("vllm", "float32", adapter=True), 13, marks=needs_vllm),
    ],
    ids=lambda value: value.title if isinstance(value, Setup) else str(value),
)
def test_every_planted_fault_is_found_and_no_right_push_is_blamed(setup, least):
    found, alarms = run_setup(setup, FAULTS, pushes=5)
    assert [name for name, said in found.items() if noticed_by(said) == "no"] == []
    assert len(found) >= least
    assert alarms == 0
