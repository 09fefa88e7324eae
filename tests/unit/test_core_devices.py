"""Devices, compiled kernels and the process group of one process."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align import doctor
from align.core import accelerator, checkpoints, distributed, extensions
from align.core.errors import ArtifactError, DeviceError
from align.pipeline import processes
from align.pipeline.running import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake_smi(tmp_path, monkeypatch):
    """Put an nvidia-smi that lists one GPU first on the path."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 535.104.12'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return script.parent


def test_gpu_that_torch_cannot_see_is_an_error_that_names_the_driver(fake_smi):
    problem = accelerator.device_conflict(num_seen=0, cuda="13.0")
    assert "driver 535.104.12" in problem
    assert "580 or newer" in problem
    assert "CUDA_VISIBLE_DEVICES=" in problem


def test_a_recipe_that_requires_a_gpu_ends_in_one_line_without_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES= hides every GPU") as error:
        run("quickstart", overrides=["device=gpu"], runs=tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    accelerator.require_device("auto")


def test_a_recipe_that_requires_a_gpu_accepts_one(fake_smi):
    accelerator.require_device("gpu")


def test_memory_of_each_gpu_is_read_in_gib(fake_smi):
    (fake_smi / "nvidia-smi").write_text("#!/bin/sh\necho '40960, 81920'\necho '[N/A], 81920'\n")
    assert accelerator.gpu_memory() == [(40.0, 80.0)]


def test_cpu_build_of_torch_beside_a_gpu_is_an_error(fake_smi):
    assert "CPU build" in accelerator.device_conflict(num_seen=0, cuda=None)


def test_hidden_or_visible_gpu_is_no_conflict(fake_smi, monkeypatch):
    assert accelerator.device_conflict(num_seen=1, cuda="13.0") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert accelerator.device_conflict(num_seen=0, cuda="13.0") is None


def test_deepspeed_on_cpu_beside_a_gpu_that_torch_sees_is_an_error(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "DS_ACCELERATOR" in accelerator.device_conflict(num_seen=2, cuda="13.0")


def test_doctor_names_a_driver_that_is_too_old(fake_smi, monkeypatch):
    monkeypatch.setattr(doctor, "_torch_devices", lambda: (0, "13.0"))
    finding = doctor._devices()
    assert finding.state == "missing"
    assert "580 or newer" in finding.line()


def test_doctor_shows_a_stale_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extensions, "build_folder", lambda: tmp_path)
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert f"rm {lock}" in doctor._kernels().line()


def test_stage_process_stops_where_torch_sees_no_gpu(fake_smi):
    code = "from align.core import distributed; distributed.init_process_group()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "DeviceError: this machine has a GPU (driver" in done.stderr or (
        "DeviceError: this machine has a GPU, but torch" in done.stderr
    )


def test_one_process_builds_no_kernel_and_listens_on_no_port(tmp_path):
    code = """
import os, glob
from align.core import distributed
distributed.init_process_group()
import torch, torch.distributed as dist
group = dist.new_group([0])
dist.all_reduce(torch.ones(1), group=group)
backend = dist.group.WORLD._get_backend(torch.device("cpu"))
print("TIMEOUT", backend.options._timeout.total_seconds())
from deepspeed.utils import groups
backend = groups._get_data_parallel_group()._get_backend(torch.device("cpu"))
print("ZERO", backend.options._timeout.total_seconds())
inodes = {os.readlink(p)[8:-1] for p in glob.glob('/proc/self/fd/*')
          if os.path.islink(p) and os.readlink(p).startswith('socket:')}
for name in ('tcp', 'tcp6'):
    for line in open('/proc/self/net/' + name).readlines()[1:]:
        fields = line.split()
        if fields[3] == '0A' and fields[9] in inodes:
            print('LISTENS', fields[1])
"""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.o"))
    # One rank may judge or hash for hours while the others wait.
    for group in ("TIMEOUT", "ZERO"):
        assert float(done.stdout.split(group)[1].split()[0]) >= 12 * 3600
    # gloo itself accepts connections of peers on the loopback address; nothing else may listen.
    addresses = [line.split()[1] for line in done.stdout.splitlines() if "LISTENS" in line]
    assert all(address.startswith("0100007F:") for address in addresses), addresses


def test_lock_of_a_killed_build_is_stale_and_removed(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extensions, "build_folder", lambda: tmp_path)
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    code = f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); time.sleep(600)"
    builder = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not lock.exists():
            assert builder.poll() is None
            time.sleep(0.01)
        assert extensions.stale_locks() == []
    finally:
        builder.kill()
        builder.wait()
    assert extensions.stale_locks() == [lock]
    extensions.prepare()
    assert not lock.exists()
    assert str(lock) in caplog.text


def test_lock_in_a_shared_folder_is_stale_only_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert extensions.stale_locks() == []
    old = time.time() - 2 * extensions.IDLE_S
    os.utime(lock, (old, old))
    assert extensions.stale_locks() == [lock]


def test_waiting_for_a_build_ends_when_its_process_is_killed(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extensions, "build_folder", lambda: tmp_path)
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    code = f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); time.sleep(2)"
    with subprocess.Popen([sys.executable, "-c", code]), caplog.at_level("INFO"):
        while not lock.exists():
            time.sleep(0.01)
        extensions.wait_for_builds()
    assert not lock.exists()
    assert "waiting for another process" in caplog.text
    assert "removed" in caplog.text


def test_build_folder_is_the_environments_and_changes_with_the_versions(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    extensions.build_folder.cache_clear()
    first = extensions.extensions_folder()
    assert first.is_relative_to(sys.prefix) or ".cache" in str(first)
    monkeypatch.setattr(extensions, "_version", lambda package: "another")
    extensions.build_folder.cache_clear()
    assert extensions.extensions_folder() != first
    extensions.build_folder.cache_clear()


def test_unmapped_segments_are_stale_and_mapped_ones_are_not(tmp_path, monkeypatch):
    import mmap

    monkeypatch.setattr(extensions, "SHARED_MEMORY", tmp_path)
    segment = tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0"
    segment.write_bytes(b"x" * 4096)
    with segment.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert extensions.stale_segments() == []
    assert extensions.stale_segments() == [segment]


def test_another_number_of_processes_than_the_recipe_names_is_an_error():
    with pytest.raises(DeviceError, match=r"ranks: 8, but 1 .*stages.sft.ranks=1"):
        distributed.check_ranks("sft", 8)
    distributed.check_ranks("sft", 1)


def test_a_checkpoint_of_another_number_of_ranks_is_refused_in_one_line(tmp_path):
    record = {"world_size": 2, "step": 1, "state": {}}
    (tmp_path / checkpoints.STATE).write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="saved by 2 ranks, resumed with 1") as error:
        checkpoints.load_checkpoint(tmp_path, {})
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken_is_one_line_with_the_port():
    """Two launches by hand with the same port: torch's error names it among frames of C++."""
    code = "from align.core import distributed, errors\ntry: distributed.init_process_group()\n"
    code += "except errors.DeviceError as e: print(e)"
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = os.environ | world | {"MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
        )
    (line,) = [text for text in done.stdout.splitlines() if "rank 0" in text]
    assert f"cannot join the other ranks at 127.0.0.1:{port}" in line
    assert "--master_port" in line


def test_ports_of_ranks_are_none_that_the_system_assigns(monkeypatch):
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert {processes.free_port() for _ in range(50)} <= set(range(1024, int(first)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", processes.free_port()))
        number = taken.getsockname()[1]
        monkeypatch.setattr(processes, "PORTS", [number, *[number + 1] * 99])
        assert processes.free_port() == number + 1
        monkeypatch.setattr(processes, "PORTS", [number] * 100)
        with pytest.raises(DeviceError, match="are in use"):
            processes.free_port()


def test_ranks_wait_for_each_other_for_hours(monkeypatch):
    """DeepSpeed's own limit of 10 minutes ended ranks that waited for a judge or for hashes."""
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert distributed.wait_limit().total_seconds() >= 12 * 3600
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "30")
    assert distributed.wait_limit().total_seconds() == 1800


@pytest.mark.parametrize("told", ["an hour", "0", "-5", "1.5"])
def test_invalid_wait_limit_is_named_before_the_ranks_join(monkeypatch, told):
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", told)
    # Another test of this process may have joined.
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    with pytest.raises(DeviceError, match=f"DEEPSPEED_TIMEOUT={told} is not a positive whole"):
        distributed.init_process_group()
