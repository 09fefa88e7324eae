"""Where a launcher has placed this process: its rank among all, and the machine of rank 0.

torchrun, srun and Kubernetes' operators start one process for each rank and describe its place in
environment variables. Nothing is started or connected here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from align.core.errors import DeviceError

PORTS = range(20_000, 32_000)
"""Ports of ranks: Linux assigns ports from 32768 on."""
CONTROL_PORT = "ALIGN_PORT"
"""Environment variable with the port on which rank 0 directs the others."""
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK"),
    *("GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
"""What a launcher sets for its own processes; those of a stage get their own."""
TORCHRUN = "TORCHELASTIC_"
"""Prefix of torchrun's variables, such as the one that makes torch use the agent's store."""


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of this process among those that one launcher has started.

    Attributes:
        launcher: its name for messages.
        rank: number of this process.
        world: how many processes there are.
        local_rank: number among the processes of this machine.
        local_world: how many of them share this machine's cores.
        address: machine of rank 0.
        port: port on which rank 0 directs the others.
        key: what all processes of the launch have in common.
        count: ranks that this process runs, from ``rank`` on; more than one with a hostfile.
    """

    launcher: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    key: str
    count: int = 1

    def rank_environment(
        self, environment: Mapping[str, str], position: int, *, ranks: int, port: int
    ) -> dict[str, str]:
        """Return the variables with which one rank of a stage joins the others.

        Args:
            environment: those of the stage.
            position: which rank of this process, from 0.
            ranks: ranks of the stage.
            port: port on which rank 0 of the stage listens.
        """
        own = {
            "RANK": self.rank + position,
            "LOCAL_RANK": self.local_rank + position,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": self.local_world,
            "LOCAL_SIZE": self.local_world,
            "MASTER_PORT": port,
        }
        joined = without_launcher(environment) | {name: str(value) for name, value in own.items()}
        return joined | {"MASTER_ADDR": self.address}


def srun_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a stage that srun has started by itself; none without srun."""
    if "RANK" in environment or (seat := seat_of(environment)) is None:
        return {}
    port = int_of(environment, "MASTER_PORT", seat.port)
    return seat.rank_environment({}, 0, ranks=seat.world, port=port)


def is_first_of_machine(environment: Mapping[str, str]) -> bool:
    """Return whether this process does what one process of each machine does for the others."""
    # Slurm's tasks with one GPU each all have local rank 0.
    return all(environment.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_LOCALID"))


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without those that a launcher sets for its own processes."""
    return {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(TORCHRUN)
    }


def seat_of(environment: Mapping[str, str]) -> Seat | None:
    """Return the place of this process; None if no launcher has started several.

    Raises:
        DeviceError: the variables contradict each other, or one is missing.
    """
    if int_of(environment, "WORLD_SIZE", 1) > 1:
        return _torch_seat(environment)
    if "SLURM_STEP_ID" in environment and int_of(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return slurm_seat(environment)
    return None


def _torch_seat(env: Mapping[str, str]) -> Seat:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise DeviceError(
            f"WORLD_SIZE is {env['WORLD_SIZE']}, but {', '.join(missing)} is not set. Start every "
            "rank with torchrun or srun, or unset WORLD_SIZE to start on this machine alone"
        )
    torchrun = f"{TORCHRUN}RUN_ID" in env
    port = int_of(env, "MASTER_PORT", 0)
    return _checked(
        Seat(
            "torchrun" if torchrun else "RANK and WORLD_SIZE",
            rank=int_of(env, "RANK", 0),
            world=int_of(env, "WORLD_SIZE", 1),
            local_rank=int_of(env, "LOCAL_RANK", 0),
            local_world=int_of(env, "LOCAL_WORLD_SIZE", 1),
            address=env["MASTER_ADDR"],
            # torchrun itself listens on its port.
            port=int_of(env, CONTROL_PORT, port + torchrun),
            key=env.get(f"{TORCHRUN}RUN_ID", ""),
        )
    )


def slurm_seat(env: Mapping[str, str]) -> Seat:
    """Return the place of a task that srun has started."""
    job, step = env.get("SLURM_JOB_ID", "0"), env["SLURM_STEP_ID"]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
    # The steps of a job, and jobs that share a machine, get different ports: 61 and the number of
    # ports have no common factor.
    number = int(job) * 61 + int(step) if (job + step).isdecimal() else 0
    # A task that has its own cores need not share them, and one with its own GPUs counts those.
    bound = "SLURM_CPUS_PER_TASK" in env
    visible = env.get("CUDA_VISIBLE_DEVICES", "").split(",")
    num_gpus = sum(bool(name.strip()) for name in visible)
    local_id = int_of(env, "SLURM_LOCALID", 0)
    return _checked(
        Seat(
            "srun",
            rank=int_of(env, "SLURM_PROCID", 0),
            world=int_of(env, "SLURM_STEP_NUM_TASKS", 1),
            local_rank=local_id % num_gpus if num_gpus else local_id,
            local_world=1 if bound else _tasks_per_node(env),
            address=env.get("MASTER_ADDR") or first_host(nodes),
            port=int_of(env, CONTROL_PORT, PORTS[number % len(PORTS)]),
            key=f"slurm {job}.{step}",
        )
    )


def _tasks_per_node(env: Mapping[str, str]) -> int:
    """Return the largest number of tasks of one node, from a text such as ``8(x3),4``."""
    counts = re.sub(r"\(x\d+\)", "", env.get("SLURM_STEP_TASKS_PER_NODE", "")).split(",")
    return max((int(count) for count in counts if count.isdecimal()), default=1)


def first_host(nodes: str) -> str:
    """Return the first name of Slurm's list of nodes, such as ``gpu[07-09,12],login``."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def int_of(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return the number in an environment variable.

    Raises:
        DeviceError: it is not a number.
    """
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise DeviceError(f"{name} is '{text}', expected a number. A launcher sets it; unset it")
    return int(text)


def _checked(seat: Seat) -> Seat:
    if seat.rank >= seat.world:
        raise DeviceError(
            f"{seat.launcher}: rank {seat.rank} of {seat.world} processes; ranks count from 0. "
            "Correct RANK or WORLD_SIZE"
        )
    if not 0 < seat.port < 2**16:
        raise DeviceError(f"{seat.launcher}: port {seat.port} does not exist. Set {CONTROL_PORT}")
    return seat
