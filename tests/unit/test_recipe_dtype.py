"""``dtype: auto`` is the machine's fast format, and settled once the recipe is read."""

from pathlib import Path

import pytest

from align.core.errors import RecipeError
from align.recipe.load import load_recipe, load_resolved, read_resolved, write_resolved
from align.recipe.schema import BaseStage
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
        schema_dtype._listed_capabilities.cache_clear()
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


@pytest.mark.parametrize(
    ("cpu", "gpus", "expected"),
    [
        (NEW, "", "float32"),  # small models on CPUs, to be compared with other machines
        (OLD, "9.0\\n9.0\\n", "bfloat16"),
        (NEW, "7.0\\n", "float32"),
        (OLD, "8.0\\n7.5\\n", "float32"),
    ],
)
def test_a_recipe_that_says_nothing_uses_bfloat16_on_gpus(machine, tmp_path, cpu, gpus, expected):
    machine(cpu, gpus)
    found = load_resolved(_without_dtype(tmp_path))
    assert found.recipe.stages["s"].dtype == expected
    assert found.origins["stages.s.dtype"] == "default here"
    # A model is pretrained in float32, and an imported one keeps its own data type.
    assert found.recipe.stages["base"].dtype is None
    assert found.recipe.dtype is None


def test_a_stage_without_dtype_has_that_of_the_recipe(machine, tmp_path):
    machine(OLD, "9.0\\n")
    path = _without_dtype(tmp_path)
    assert load_recipe(path, ["dtype=float32"]).stages["s"].dtype == "float32"
    own = load_recipe(path, ["dtype=float32", "stages.s.dtype=bfloat16"])
    assert own.stages["s"].dtype == "bfloat16"
    # The resolved recipe that a stage's process reads is the same on a machine without a GPU.
    write_resolved(load_recipe(path), tmp_path / "resolved.yaml")
    machine(OLD, "7.0\\n")
    assert read_resolved(tmp_path / "resolved.yaml").stages["s"].dtype == "bfloat16"


def test_an_unknown_dtype_of_the_recipe_is_named_once(machine, tmp_path):
    machine(OLD)
    path = _without_dtype(tmp_path)
    path.write_text(path.read_text().replace("name: r\n", "name: r\ndtype: fp16\n"))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{path}:3:8: dtype: ")


def _without_dtype(folder: Path) -> Path:
    path = folder / "r.yaml"
    path.write_text(RECIPE.replace(" dtype: %s,", ""))
    return path


def test_a_finished_import_is_recognized_by_its_former_default():
    path = {"kind": "base", "path": "some/model"}
    now, before = (BaseStage(**path, **more) for more in ({}, {"dtype": "float32"}))
    assert now.settings() == before.settings()
    assert now.settings()["dtype"] == "float32"
    assert BaseStage(**path, dtype="bfloat16").settings()["dtype"] == "bfloat16"


def test_recipe_holds_the_settled_format(machine, tmp_path: Path):
    machine(NEW)
    path = tmp_path / "r.yaml"
    for written, held in (("auto", "bfloat16"), ("float32", "float32")):
        path.write_text(RECIPE % written)
        assert load_recipe(path).stages["s"].dtype == held
