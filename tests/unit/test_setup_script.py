"""scripts/setup.sh refuses a machine before it downloads anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("gpu", "needed"), [(False, 8), (True, 20)])
def test_a_gpu_machine_needs_the_disk_of_the_gpu_wheels(
    tmp_path: Path, gpu: bool, needed: int
) -> None:
    """11 to 13 GB unpacked, 4 GB of wheels, and pip's copies; the CPU set takes less."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    free_kib = 7 * 2**20
    fakes = {
        "df": f"echo Filesystem; echo /dev/vda 1 1 {free_kib}",
        "nvidia-smi": "echo 'GPU 0: NVIDIA H100'" if gpu else "exit 9",
    }
    for name, body in fakes.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    env.pop("ALIGN_VLLM", None)
    done = subprocess.run(
        ["bash", script], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert f"7 GiB free in {tmp_path}, the set-up needs {needed}" in done.stdout + done.stderr
    assert not (tmp_path / ".venv").exists()
