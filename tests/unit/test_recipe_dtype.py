"""``dtype: auto`` is the machine's fast format, and settled once the recipe is read."""

from pathlib import Path

import pytest

from align.recipe.load import load_recipe
from align.recipe.schema import dtype as schema_dtype

OLD = "processor : 0\nflags\t\t: fpu sse avx2 avx512f avx512_vnni\n"
NEW = "processor : 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n"
RECIPE = """
name: r
stages:
  base: {kind: base, build: {hidden_size: 64}, data: [{world: corpus, rows: 8}], steps: 1}
  s: {kind: sft, init: base, dtype: %s, data: [{world: sft, rows: 8}]}
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that makes this machine another one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)

    def make(cpu: str, gpus: str = "") -> None:
        (tmp_path / "cpuinfo").write_text(cpu)
        monkeypatch.setattr(schema_dtype, "CPUINFO", tmp_path / "cpuinfo")
        if gpus:
            script = tmp_path / "nvidia-smi"
            script.write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
            script.chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("cpu", "gpus", "expected"),
    [
        (OLD, "", "float32"),
        (NEW, "", "bfloat16"),
        ("processor : 0\n", "", "float32"),
        (OLD, "9.0\\n9.0\\n", "bfloat16"),  # H100
        (NEW, "7.0\\n", "float32"),  # V100: it has no bfloat16, whatever its CPU has
        (OLD, "8.0\\n7.5\\n", "float32"),  # ranks share one format
        (NEW, "No devices were found\\n", "bfloat16"),
    ],
)
def test_auto_is_what_the_hardware_computes_fast(machine, cpu, gpus, expected):
    machine(cpu, gpus)
    assert schema_dtype.fast_dtype() == expected


def test_auto_follows_what_is_switched_off(machine, monkeypatch):
    machine(NEW, "9.0\\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert schema_dtype.fast_dtype() == "bfloat16"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert schema_dtype.fast_dtype() == "float32"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert schema_dtype.fast_dtype() == "bfloat16"


def test_recipe_holds_the_settled_format(machine, tmp_path: Path):
    machine(NEW)
    path = tmp_path / "r.yaml"
    for written, held in (("auto", "bfloat16"), ("float32", "float32")):
        path.write_text(RECIPE % written)
        assert load_recipe(path).stages["s"].dtype == held
