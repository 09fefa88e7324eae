"""The data type of a stage's weights; ``auto`` is settled where the recipe is read."""

import os
import subprocess
from functools import cache
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
    if _compute_capabilities():
        return usual_dtype()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if not any(part in limit for part in ONEDNN_WITH):
        return "float32"
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "float32"
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return "float32" if CPU_FLAGS.isdisjoint(flags) else "bfloat16"


def usual_dtype() -> Literal["float32", "bfloat16"]:
    """Return what stages use if a recipe says nothing: bfloat16 on GPUs that compute it.

    A CPU is float32 here even if it computes bfloat16 faster: what runs on a CPU are small models,
    often to be compared with those of another machine.
    """
    return "bfloat16" if min(_compute_capabilities(), default=0.0) >= 8.0 else "float32"


def _compute_capabilities() -> tuple[float, ...]:
    """Return the compute capability of each GPU; empty if there is none, or all are hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ()
    return _listed_capabilities(os.environ.get("PATH", ""))


@cache
def _listed_capabilities(_path: str) -> tuple[float, ...]:
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
        return tuple(float(line) for line in done.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def _settled(value: object) -> Any:
    return fast_dtype() if value == "auto" else value


Dtype = Annotated[
    Literal["float32", "bfloat16"],
    BeforeValidator(_settled),
    WithJsonSchema({"enum": ["float32", "bfloat16", "auto"], "type": "string"}),
]
"""``float32``, ``bfloat16``, or in a recipe ``auto``."""
