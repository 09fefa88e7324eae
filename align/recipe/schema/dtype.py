"""The number format of a stage's weights; ``auto`` is settled where the recipe is read."""

import os
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
"""A CPU with one of them multiplies bfloat16 faster than float32."""

ONEDNN_WITH = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")
"""Parts of the values of ONEDNN_MAX_CPU_ISA that leave these instructions on."""


def fast_dtype() -> Literal["float32", "bfloat16"]:
    """Return bfloat16 where this machine computes it fast, else float32.

    That is a GPU of compute capability 8.0 on (all of them, where there are several), or without
    a GPU a CPU with AMX or AVX-512 instructions for it.
    """
    capabilities = _compute_capabilities()
    if capabilities:
        return "bfloat16" if min(capabilities) >= 8.0 else "float32"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if not any(part in limit for part in ONEDNN_WITH):
        return "float32"
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "float32"
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return "float32" if CPU_FLAGS.isdisjoint(flags) else "bfloat16"


def _compute_capabilities() -> list[float]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
        return [float(line) for line in done.stdout.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _settled(value: object) -> Any:
    return fast_dtype() if value == "auto" else value


Dtype = Annotated[
    Literal["float32", "bfloat16"],
    BeforeValidator(_settled),
    WithJsonSchema({"enum": ["float32", "bfloat16", "auto"], "type": "string"}),
]
"""``float32``, ``bfloat16``, or in a recipe ``auto``."""
