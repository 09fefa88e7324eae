"""Ranks on several machines, simulated by processes: who runs what, how they end, what is said."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from align.core.errors import DeviceError
from align.core.seats import Seat, first_host, is_first_of_machine, seat_of, srun_environment
from align.pipeline.hosts import forwarded, read_hostfile
from align.pipeline.nodes import Party, introduction
from align.pipeline.processes import Signals, free_port

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0
RECIPE = """\
name: toy
stages:
  base: {kind: base, build: {vocab_size: 64}, data: [{world: corpus}], steps: 1}
  sft: {kind: sft, init: base, data: [{world: sft}], ranks: 2}
"""
# A rank notes where it is, and obeys the file that a test has put beside it.
STAGE = """\
import json, os, signal, socket, sys, time
from pathlib import Path
from align.core.artifacts import read_manifest, spec_hash, write_manifest
from align.recipe.load import read_resolved

given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
recipe, name = read_resolved(given["--resolved"]), given["--stage"]
run, rank = Path(given["--run-dir"]), os.environ.get("RANK", "alone")
Path(f"{name}.{rank}.json").write_text(json.dumps({**os.environ, "pid": os.getpid()}))
print(f"{name}: rank {rank} says hello", flush=True)
if Path("long").exists() and rank == "1":
    sys.stdout.buffer.write(b"_" * 2**16 + 50_000 * chr(233).encode() + bytes([255, 10]))
    sys.stdout.flush()
told = Path(f"{name}.{rank}.do")
if told.exists() and told.read_text() == "stop":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Path(f"{name}.{rank}.ready").touch()
    signal.sigwait({signal.SIGTERM})
    sys.exit(75)
if told.exists():
    while not Path(f"{name}.0.ready").exists():
        time.sleep(0.05)
    code = int(told.read_text())
    os.kill(os.getpid(), signal.SIGKILL) if code == -9 else sys.exit(code)
if rank in ("0", "alone"):
    spec = recipe.stages[name]
    made = {k: read_manifest(run / v)["spec_hash"] for k, v in recipe.inputs(name).items()}
    write_manifest(run / name, {
        "kind": spec.produces, "stage": name, "stage_kind": spec.kind,
        "spec": spec.model_dump(mode="json"),
        "spec_hash": spec_hash(spec.settings(), seed=recipe.seed_of(name), inputs=made),
        "inputs": {k: {"spec_hash": h} for k, h in made.items()},
        "seed": 0, "data": [], "seconds": 1.0, "peak_rss_gib": 0.1, "metrics": {},
    })
"""
START = """\
import sys
from pathlib import Path
from align.core.errors import AlignError
from align.pipeline import follow, nodes, spread
from align.pipeline.running import run
nodes.JOIN_S, follow.VISIBLE_S = 120.0, 2.0
spread.LAST_WORDS_S = follow.LAST_WORDS_S = 1.0
try:
    hosts = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    code = run("r.yaml", module="toy_stages", hostfile=hosts, runs=Path.cwd() / "runs")
except AlignError as error:
    print(error)
    code = error.exit_code
raise SystemExit(code)
"""


@pytest.fixture(autouse=True)
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    Path("r.yaml").write_text(RECIPE)
    Path("toy_stages.py").write_text(STAGE)
    Path("start.py").write_text(START)
    children: list[subprocess.Popen] = []
    yield children
    for child in children:
        child.kill()
        child.wait()


def begin(
    children: list[subprocess.Popen],
    ranks: Sequence[int] = (0, 1),
    *,
    script: str = "start.py",
    **environment: str,
) -> list[subprocess.Popen]:
    """Start ``align run`` once for each rank, as a launcher does."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    for rank in ranks:
        children.append(
            subprocess.Popen(
                [sys.executable, script],
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": "0", **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return children


def end(children: Sequence[subprocess.Popen]) -> tuple[list[int], list[str]]:
    said = [child.communicate(timeout=LIMIT_S)[0] for child in children]
    return [child.returncode for child in children], said


def noted(stage: str, rank: str) -> dict[str, str]:
    return json.loads(Path(f"{stage}.{rank}.json").read_text())


def wait_for(*paths: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not all(Path(path).exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.05)


def wait_in_sft(children: list[subprocess.Popen]) -> None:
    """Start two ranks and return when both are in the middle of their stage."""
    for rank in (0, 1):
        Path(f"sft.{rank}.do").write_text("stop")
    begin(children)
    wait_for("sft.0.ready", "sft.1.ready")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_each_process_runs_its_rank_and_the_first_alone_writes_the_run(started: list) -> None:
    Path("long").touch()
    codes, said = end(begin(started, LOCAL_WORLD_SIZE="1"))
    assert codes == [0, 0], said
    assert "2 ranks on 1 machine, started by RANK and WORLD_SIZE" in said[0]
    assert "with fewer ranks: base 1" in said[0]
    assert said[1] == ""
    # One rank has no launcher's variables; several meet at one port that is not the run's own.
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & noted("base", "alone").keys()
    first, second = noted("sft", "0"), noted("sft", "1")
    assert [first["RANK"], second["RANK"]] == ["0", "1"]
    assert first["WORLD_SIZE"] == second["WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    log = Path("runs/toy/sft/log.txt").read_bytes()
    assert b"rank 0 says hello" in log
    assert b"rank 1 says hello" in log
    # Two bytes a character, and one that is no character: none may be changed on the way.
    assert log.count(b"\xc3\xa9") == 50_000
    assert b"\xa9\xff\n" in log
    assert Path("runs/toy/summary.json").is_file()
    # A second start finds everything done and starts no rank.
    Path("sft.1.json").unlink()
    assert end(begin([]))[0] == [0, 0]
    assert not Path("sft.1.json").exists()


@pytest.mark.parametrize(
    ("told", "code", "reason"),
    [("-9", 1, "killed by SIGKILL; the machine may"), ("2", 2, "exit code 2")],
)
def test_the_end_of_one_rank_ends_all_with_its_reason(
    told: str, code: int, reason: str, started: list
) -> None:
    Path("sft.0.do").write_text("stop")  # would wait for ever
    Path("sft.1.do").write_text(told)
    codes, said = end(begin(started))
    assert codes == [code, code], said
    assert "sft: failed (rank 1 on " in said[0]
    assert reason in said[0]
    assert gone(int(noted("sft", "0")["pid"]))


def test_a_rank_that_was_killed_is_the_reason_although_others_fail_first() -> None:
    from align.pipeline.spread import SpreadStage

    stage = SpreadStage.__new__(SpreadStage)
    stage._count, stage._codes, stage._first = 3, {}, None
    stage._killed, stage._failed_at, stage._hosts = False, 0.0, {2: "far"}
    stage._note(0, 1)
    stage._note(2, -9)
    stage._killed = True
    stage._note(1, -9)  # by rank 0 itself, after the failure
    assert stage._result() == -9
    assert stage.place == "rank 2 on far: "


@pytest.mark.parametrize("which", [[1], [0, 1]])
def test_a_signal_stops_every_rank_once(which: list[int], started: list) -> None:
    wait_in_sft(started)
    for process in which:
        started[process].send_signal(signal.SIGTERM)
    codes, said = end(started)
    assert codes == [75, 75], said
    assert "Run the same command again to resume" in said[0]


def test_a_signal_to_another_process_stops_a_stage_of_one_rank(started: list) -> None:
    Path("base.alone.do").write_text("stop")
    begin(started)
    wait_for("base.alone.ready")
    started[1].send_signal(signal.SIGTERM)
    codes, said = end(started)
    assert codes == [75, 75], said
    assert "base: stopped" in said[0]


def test_the_signal_of_a_launcher_counts_once_in_either_order() -> None:
    with Signals() as signals:
        signals.forward(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signals.forward(signal.SIGTERM)
        assert signals.count == 1
        signal.raise_signal(signal.SIGTERM)
        assert signals.count == 2


def test_a_lost_process_ends_the_run_and_is_named(started: list) -> None:
    wait_in_sft(started)
    started[1].kill()
    code, said = started[0].wait(timeout=LIMIT_S), started[0].communicate()[0]
    assert code == 1
    assert "lost. Its align run has ended, or the machine or the network has failed" in said
    # A real rank watches its align run; this one would wait for ever.
    os.kill(int(noted("sft", "1")["pid"]), signal.SIGKILL)


def test_without_rank_0_the_others_end(started: list) -> None:
    wait_in_sft(started)
    started[0].kill()
    code, said = started[1].wait(timeout=LIMIT_S), started[1].communicate()[0]
    assert code == 2
    assert "rank 1: the align run of rank 0 on localhost has ended" in said
    assert gone(int(noted("sft", "1")["pid"]))


def test_another_number_of_ranks_than_the_recipes_is_an_error_of_all(started: list) -> None:
    Path("r.yaml").write_text(RECIPE.replace("ranks: 2", "ranks: 4, batch_size: 32"))
    codes, said = end(begin(started))
    assert codes == [2, 2]
    assert "2 ranks were started, but the most that the recipe uses is ranks: 4" in said[0]
    assert "--set stages.sft.ranks=2" in said[0]


def test_an_error_of_the_recipe_is_said_once(started: list) -> None:
    Path("r.yaml").write_text(RECIPE.replace("kind: sft", "kind: sfd"))
    codes, said = end(begin(started))
    assert codes == [2, 2]
    assert "sfd" in said[0]
    assert said[1] == ""


@pytest.mark.parametrize(
    "changed",
    [
        {"hello": "another run"},
        {"rank": 0},
        {"rank": 2},
        {"count": 0},
        {"count": 2},
        {"count": 10**30},
        {"rank": "1"},
        {"host": None},
    ],
)
def test_a_process_that_does_not_belong_to_the_run_is_refused(changed: dict) -> None:
    port = free_port()
    seat = Seat("srun", 0, 2, 0, 1, "localhost", port, "this run")
    party = Party(seat, Signals())
    with socket.create_connection(("localhost", port)) as stranger:
        other = introduction(Seat("srun", 1, 2, 0, 1, "localhost", port, "this run"))
        stranger.sendall(json.dumps(other | changed).encode() + b"\n")
        party._accept(60.0)
        assert b"belongs to another run" in stranger.recv(1000)
    assert party.members == []
    party.close()


def fake_ssh(tmp_path: Path, folder: str = ".") -> None:
    """Put a program in the place of ssh that runs the command in this machine's shell."""
    script = tmp_path / "ssh"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> ssh.txt\nshift\ncd {folder}\n'
        'exec env -i HOME=/ PATH="$PATH" sh -c "$1"\n'
    )
    script.chmod(0o755)


def start_with_hosts(text: str, **environment: str) -> tuple[int, str]:
    Path("hosts").write_text(text)
    done = subprocess.run(
        [sys.executable, "start.py", "hosts"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_hostfile_starts_the_ranks_over_ssh_with_the_environment(tmp_path: Path) -> None:
    fake_ssh(tmp_path)
    Path("r.yaml").write_text(RECIPE.replace("ranks: 2", "ranks: 3, batch_size: 30"))
    given = {"HF_TOKEN": "secret", "NCCL_DEBUG": "INFO", "MINE": "1", "ALIGN_PARENT": "1:1"}
    code, said = start_with_hosts(
        "127.0.0.1 slots=1\n\n# the second\n127.0.0.2 slots = 2\n",
        ALIGN_SSH=str(tmp_path / "ssh"),
        **given,
    )
    assert code == 0, said
    assert "3 ranks on 1 machine, started by ssh" in said
    first, second, third = (noted("sft", rank) for rank in "012")
    assert [x["LOCAL_RANK"] for x in (first, second, third)] == ["0", "0", "1"]
    assert {x["MASTER_PORT"] for x in (second, third)} == {first["MASTER_PORT"]}
    assert second["HF_TOKEN"] == "secret"
    assert second["NCCL_DEBUG"] == "INFO"
    assert "MINE" in first
    assert "MINE" not in second
    assert second["ALIGN_PARENT"] != first["ALIGN_PARENT"]
    # Command lines are public.
    assert "secret" not in Path("ssh.txt").read_text()


def test_a_machine_that_does_not_see_the_run_folder_is_named(started: list) -> None:
    begin(started, ranks=(0,))
    # Every file has another content there, as on a machine with a disk of its own.
    blind = START.replace("try:", "Path.read_bytes = lambda self: b''\ntry:", 1)
    Path("blind.py").write_text(blind)
    environment = Path(f"/proc/{started[0].pid}/environ").read_bytes().decode().split("\0")
    port = next(x.partition("=")[2] for x in environment if x.startswith("MASTER_PORT="))
    codes, said = end(begin(started, (1,), script="blind.py", MASTER_PORT=port))
    assert codes == [2, 2], said
    assert "must be on a file system that all machines share" in said[0]


def test_a_host_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    script = tmp_path / "ssh"
    script.write_text("#!/bin/sh\necho 'ssh: connect to host: No route to host' >&2\nexit 255\n")
    script.chmod(0o755)
    code, said = start_with_hosts("127.0.0.1 slots=1\nfar slots=1\n", ALIGN_SSH=str(script))
    assert code == 2
    assert "did not join: far: exit code 255: ssh: connect to host: No route to host" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no host"),
        ("localhost\n", "hosts:1: 'localhost' is not a host"),
        ("localhost slots=0\n", "hosts:1: 'localhost slots=0'"),
        ("localhost slots=1\n-oProxyCommand=x slots=1\n", "hosts:2: '-oProxyCommand=x slots=1'"),
        ("localhost slots=1\nlocalhost slots=2\n", "listed twice"),
        ("192.0.2.1 slots=1\n", "is not this machine"),
    ],
)
def test_a_line_of_a_hostfile_that_cannot_be_meant_is_named(text: str, message: str) -> None:
    Path("hosts").write_text(text)
    with pytest.raises(DeviceError, match=message):
        read_hostfile(Path("hosts"))


def test_a_hostfile_is_read_as_deepspeed_reads_it() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    Path("hosts").write_text("localhost slots=2\n# comment\n\nnode-2.local slots=8\n")
    expected = fetch_hostfile("hosts")
    assert [(h.name, h.slots) for h in read_hostfile(Path("hosts"))] == list(expected.items())


def test_only_named_variables_travel() -> None:
    env = {"PATH": "p", "PYTHONPATH": "q", "TORCH_EXTENSIONS_DIR": "t", "OMP_NUM_THREADS": "2"}
    local = {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "3", "ALIGN_PARENT": "1", "RANK": "0"}
    assert forwarded(env | local) == env


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-09,12],login", "gpu07"),
        ("a,b", "a"),
        ("one", "one"),
        ("n[1,3]", "n1"),
        ("rack[1-2].local", "rack1.local"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


SLURM = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}


def test_a_task_of_srun_knows_its_place() -> None:
    seat = seat_of(SLURM)
    assert seat is not None
    assert (seat.rank, seat.world, seat.local_rank, seat.local_world) == (9, 16, 1, 8)
    assert seat.address == "gpu1"
    other = seat_of(SLURM | {"SLURM_STEP_ID": "1"})
    assert other is not None
    assert other.port != seat.port
    ports = {seat_of(SLURM | {"SLURM_JOB_ID": str(job)}).port for job in range(5000)}  # pyright: ignore
    assert len(ports) == 5000
    # A task that sees one GPU uses its first; one with its own cores shares them with none.
    alone = seat_of(SLURM | {"CUDA_VISIBLE_DEVICES": "5", "SLURM_CPUS_PER_TASK": "4"})
    assert alone is not None
    assert (alone.local_rank, alone.local_world) == (0, 1)
    # A batch script is no task of a step, and one task is no launch.
    assert seat_of({k: v for k, v in SLURM.items() if "STEP" not in k}) is None
    assert seat_of(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(
    ("visible", "locals_"),
    [
        ("", [0, 1, 2, 3]),  # nothing is hidden
        ("0,1,2,3", [0, 1, 2, 3]),  # one list for all tasks of the node
        ("3", [0, 0, 0, 0]),
        ("GPU-8f3ac1d2-0b1c", [0, 0, 0, 0]),
        ("MIG-7e11,", [0, 0, 0, 0]),
        ("0,1", [0, 1, 0, 1]),  # --gpus-per-task=2: each task has two of its own
    ],
)
def test_a_task_of_srun_uses_a_gpu_that_it_sees(visible: str, locals_: list[int]) -> None:
    for local, expected in enumerate(locals_):
        task = SLURM | {"SLURM_LOCALID": str(local), "CUDA_VISIBLE_DEVICES": visible}
        assert srun_environment(task)["LOCAL_RANK"] == str(expected)


def test_one_process_of_a_machine_prepares_it() -> None:
    tasks = [
        SLURM | {"SLURM_LOCALID": str(local), "CUDA_VISIBLE_DEVICES": str(local)}
        for local in range(4)
    ]
    # Every task has local rank 0, since it sees one GPU.
    joined = [task | srun_environment(task) for task in tasks]
    assert {task["LOCAL_RANK"] for task in joined} == {"0"}
    assert [is_first_of_machine(task) for task in joined] == [True, False, False, False]
    # torchrun below srun: Slurm has one task on each node, torchrun numbers the ranks.
    ranks = [{"SLURM_LOCALID": "0", "LOCAL_RANK": str(local)} for local in range(2)]
    assert [is_first_of_machine(rank) for rank in [*ranks, {}]] == [True, False, True]


def test_a_stage_that_srun_starts_by_itself_joins_the_others() -> None:
    joined = srun_environment(SLURM | {"MASTER_PORT": "1"})
    assert (joined["RANK"], joined["WORLD_SIZE"], joined["LOCAL_RANK"]) == ("9", "16", "1")
    assert (joined["MASTER_ADDR"], joined["MASTER_PORT"]) == ("gpu1", "1")
    assert srun_environment(SLURM | {"RANK": "0"}) == {}
    assert srun_environment({}) == {}


def test_variables_of_a_launcher_that_contradict_each_other_are_an_error() -> None:
    torch = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    seat = seat_of(torch)
    assert seat is not None
    assert seat.port == 29500
    elastic = seat_of(torch | {"TORCHELASTIC_RUN_ID": "x"})
    assert elastic is not None
    assert (elastic.launcher, elastic.port) == ("torchrun", 29501)
    with pytest.raises(DeviceError, match="MASTER_ADDR is not set"):
        seat_of({k: v for k, v in torch.items() if k != "MASTER_ADDR"})
    with pytest.raises(DeviceError, match="rank 2 of 2 processes"):
        seat_of(torch | {"RANK": "2"})
    for wrong in ("x", "\u00b2", "-1"):
        with pytest.raises(DeviceError, match=f"RANK is '{wrong}', expected a number"):
            seat_of(torch | {"RANK": wrong})
