"""Ranks on two machines, simulated by network namespaces: torchrun, ssh, deepspeed, a cut network.

The bytes of the model are those of the same ranks on one machine. Needs root, iproute2 and, for
hostfiles, openssh-server (for deepspeed's own launcher also pdsh).
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from machines import LIMIT_S, Machines, align, end, missing_tools
from stage_runs import BASE

ROOT = Path(__file__).resolve().parents[2]
RECIPE = f"""\
name: two
seed: 3
stages:
{BASE}"""
RECIPE += """\
  sft:
    kind: sft
    init: base
    data: [{world: sft, rows: 32, split: train}]
    steps: 3
    batch_size: 8
    micro_tokens: 256
    ranks: 2
    threads: 1
    zero: {stage: 2}
    optim: {learning_rate: 1.0e-3}
"""
pytestmark = [pytest.mark.long, pytest.mark.slow]


def need(*names: str) -> None:
    if (reason := missing_tools("ip", *names)) is not None:
        pytest.skip(reason)


def model_hash(run: Path) -> str:
    return hashlib.sha256((run / "sft/model/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run both stages with two ranks on this machine."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "two.yaml").write_text(RECIPE)
    done = subprocess.run(
        align("run", str(folder / "two.yaml"), "--runs", str(folder / "runs")),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "up to 2 ranks on this machine, started by deepspeed" in done.stdout
    return folder


@pytest.fixture
def words(one_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments of ``align run`` for a folder of its own, with the same base model."""
    shutil.copytree(one_machine / "runs/two/base", tmp_path / "runs/two/base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    Path("two.yaml").write_text(RECIPE)
    return ["run", str(tmp_path / "two.yaml"), "--runs", str(tmp_path / "runs")]


def torchrun(two: Machines, number: int, words: list[str]) -> list[str]:
    # Both machines have this one's name, by which torchrun would look for the first.
    conf = f"is_host={'true' if number == 0 else 'false'}"
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500", "--rdzv-id", "two"),
        *("--rdzv-conf", conf, "--local-addr", two.addresses[number], "-m", "align", *words),
    ]


def test_torchrun_on_two_machines_gives_the_bytes_of_one(
    one_machine: Path, words: list[str], tmp_path: Path
) -> None:
    need()
    with Machines(tmp_path) as two:
        started = [two.start(i, torchrun(two, i, words)) for i in (0, 1)]
        codes, said = end(started)
    assert codes == [0, 0], said
    assert "2 ranks on 1 machine, started by torchrun" in "".join(said)
    assert model_hash(tmp_path / "runs/two") == model_hash(one_machine / "runs/two")


def test_a_hostfile_on_two_machines_gives_the_bytes_of_one(
    one_machine: Path, words: list[str], tmp_path: Path
) -> None:
    need("sshd", "ssh")
    Path("hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    with Machines(tmp_path) as two:
        ssh = two.sshd()
        run = two.start(0, align(*words, "--hostfile", "hosts"), ALIGN_SSH=ssh)
        codes, said = end([run])
    assert codes == [0], said
    assert "2 ranks on 1 machine, started by ssh" in said[0]
    assert model_hash(tmp_path / "runs/two") == model_hash(one_machine / "runs/two")


def test_a_machine_without_network_ends_both_sides_with_a_message(
    words: list[str], tmp_path: Path
) -> None:
    need()
    Path("two.yaml").write_text(RECIPE.replace("steps: 3", "steps: 20000"))
    metrics = tmp_path / "runs/two/sft/metrics.jsonl"
    with Machines(tmp_path) as two:
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": two.addresses[0], "MASTER_PORT": "29500"}
        started = [two.start(i, align(*words), RANK=str(i), **world) for i in (0, 1)]
        deadline = time.monotonic() + LIMIT_S
        while not metrics.exists() or metrics.stat().st_size < 1000:
            assert all(p.poll() is None for p in started), end(started)
            assert time.monotonic() < deadline
            time.sleep(0.2)
        two.cut()
        codes, said = end(started)
    assert codes == [1, 2], said
    assert "lost. Its align run has ended, or the machine or the network has failed" in said[0]
    assert "rank 1: the align run of rank 0 on 10.77.0.1 has ended" in said[1]
