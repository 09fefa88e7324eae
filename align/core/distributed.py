"""Process groups: start-up, seeds, and the collectives that the suite needs."""

import hashlib
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist

from align.core import distributed, extensions
from align.core.accelerator import device_conflict, require_device
from align.core.errors import EXIT_PREEMPTED, AlignError, DeviceError, Preempted
from align.core.lock import started_at
from align.core.seats import is_first_of_machine, srun_environment

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
_LIMIT = timedelta(hours=24)


def init_process_group(*, deterministic: bool = False, device: str = "auto") -> None:
    """Join the launcher's process group, or create one with a single rank without a launcher.

    Args:
        deterministic: take deterministic kernels on a GPU, see ``_use_deterministic_kernels``.
        device: that of the recipe; ``gpu`` requires one.

    Raises:
        DeviceError: the recipe requires a GPU and there is none; or the machine has one that torch
            cannot use, or DeepSpeed may not; or the ranks do not find each other; or
            DEEPSPEED_TIMEOUT is invalid.
    """
    if dist.is_initialized():
        return
    require_device(device)
    # DeepSpeed's import fails on an invalid limit without naming it.
    wait_limit()
    if deterministic:
        _use_deterministic_kernels()
    on_gpu = torch.cuda.is_available()
    problem = device_conflict(num_seen=torch.cuda.device_count(), cuda=torch.version.cuda)
    if problem is not None:
        raise DeviceError(problem)
    # A stage of 'align run' inherits Slurm's variables, but those of its ranks are set.
    if PARENT not in os.environ:
        os.environ.update(srun_environment(os.environ))
    launched = "RANK" in os.environ
    if not launched:
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(world, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    # DeepSpeed detects its accelerator on import, so set it first.
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # One rank per machine removes stale locks; the others would race with it.
    if is_first_of_machine(os.environ):
        extensions.prepare()
    log.info("importing DeepSpeed")
    import deepspeed

    # DeepSpeed would compile an op for inference on CPU that training never calls.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    _join("nccl" if on_gpu else "gloo", launched=launched)


def _join(backend: str, *, launched: bool) -> None:
    """Join the ranks of the launcher, or make a group of this process alone."""
    import deepspeed
    from deepspeed.utils import groups

    timeout = wait_limit()
    if not launched:
        # One process needs no store that listens on a port.
        dist.init_process_group(
            backend,
            store=dist.HashStore(),  # pyright: ignore[reportPrivateImportUsage]
            rank=0,
            world_size=1,
            timeout=timeout,
        )
    try:
        deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        told = " ".join(str(error).split("\n")[0].split())[:300]
        raise DeviceError(
            f"rank {os.environ['RANK']} cannot join the other ranks at {place} ({told}). Another "
            "process may use this port. Run the same command again, with another --master_port if "
            "you start the ranks by hand"
        ) from error
    # ZeRO's gathers have a group of their own, which DeepSpeed would make with torch's limit: 10
    # minutes with NCCL, as long as rank 0 waits for space on a full disk while it saves.
    groups._WORLD_GROUP = new_group(range(dist.get_world_size()))


def wait_limit() -> timedelta:
    """Return how long ranks wait for each other: 24 hours, or DEEPSPEED_TIMEOUT in minutes.

    Every process group takes this limit, since one rank may judge or hash for hours.

    Raises:
        DeviceError: DEEPSPEED_TIMEOUT is not a positive whole number.
    """
    told = os.environ.get("DEEPSPEED_TIMEOUT")
    if not told:
        return _LIMIT
    if not told.isdecimal() or int(told) == 0:
        raise DeviceError(
            f"DEEPSPEED_TIMEOUT={told} is not a positive whole number of minutes. Set one, or "
            f"unset it to let ranks wait for each other for {_LIMIT // timedelta(hours=1)} hours"
        )
    return timedelta(minutes=int(told))


def new_group(ranks: Sequence[int], *, backend: str | None = None) -> Any:
    """Return torch's process group of ``ranks``; all ranks must call this.

    Args:
        ranks: its members.
        backend: of the group; None for that of the stage's ranks.
    """
    return dist.new_group([*ranks], backend=backend, timeout=wait_limit())


def _use_deterministic_kernels() -> None:
    """Make every operation deterministic; call this before the first operation on a GPU.

    An operation that has no such kernel warns.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Uninitialized memory is never read here; filling it only costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore


def check_ranks(stage: str, ranks: int) -> None:
    """Refuse a number of processes that the recipe does not name: prompts would be left out.

    Raises:
        DeviceError: the launcher started another number.
    """
    if world_size() != ranks:
        raise DeviceError(
            f"stage '{stage}' has ranks: {ranks}, but {world_size()} process(es) were started. "
            f"Start {ranks}, or pass --set stages.{stage}.ranks={world_size()}"
        )


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Exit this process immediately with ``code`` after flushing all output.

    A normal interpreter exit is a race: a gloo thread that releases a tensor while Python shuts
    down aborts the process (exit code -6) after its work is done and saved.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited or there was a network error",
)
"""What gloo and NCCL say of a collective whose other side is gone."""


def lost_a_rank(error: BaseException) -> bool:
    """Return True if a collective failed because another rank ended."""
    is_lost = isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)
    return world_size() > 1 and is_lost


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank() -> int:
    """Return this process's rank, 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """Return the device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def global_sums(values: Mapping[str, float]) -> dict[str, float]:
    """Sum each value over all ranks in float64; every rank must pass the same keys."""
    keys = sorted(values)
    total = torch.tensor([float(values[k]) for k in keys], dtype=torch.float64, device=device())
    if world_size() > 1:
        dist.all_reduce(total)
    return dict(zip(keys, total.tolist(), strict=True))


def global_sum(value: float) -> float:
    """Sum one number over all ranks in float64."""
    return global_sums({"value": value})["value"]


def sum_in_place(x: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks in place; every rank must pass the same shape."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def global_max(value: float) -> float:
    """Return the maximum of one number over all ranks."""
    total = torch.tensor(float(value), dtype=torch.float64, device=device())
    if world_size() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return float(total)


def gather_objects(value: object) -> list[Any]:
    """Return the picklable ``value`` of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast_object(value: object) -> Any:
    """Return rank 0's ``value`` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first_rank(do: Callable[[], T]) -> T:
    """Return the result of ``do`` on rank 0; an AlignError that it raises is raised on every rank.

    All ranks must call this.
    """
    value, error = None, None
    if rank() == 0:
        try:
            value = do()
        except AlignError as e:
            error = e
    # The other ranks wait here, so an error of rank 0 cannot leave them in a later collective.
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return cast(T, value)


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a 62-bit seed from (seed, purpose, step, rank ...), independent of other purposes."""
    # A hash, not an offset: neighboring seeds and steps must not share random numbers.
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on this rank; ranks use different streams."""
    import numpy as np

    # NumPy accepts only 32 bits.
    value = derive_seed(seed, "process", rank())
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def shard(items: Sequence[Any]) -> list[Any]:
    """Return this rank's part of ``items``: contiguous, with sizes differing by at most one."""
    n, r, w = len(items), rank(), world_size()
    return list(items[n * r // w : n * (r + 1) // w])


PARENT = "ALIGN_PARENT"
"""Environment variable with process id and start time of the ``align run`` that started a stage."""
ORPHAN_GRACE_S = 30.0
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed")
_asked = False
_stopping = False
_deferred = False
_installed_by = 0


class StoppedNow(SystemExit):
    """Stop of a stage by a signal outside its steps; ``except Exception`` does not catch it."""


def _ask(_signum: int, _frame: FrameType | None) -> None:
    global _asked, _stopping
    # A forked child inherits the handler; its signals do not concern the stage.
    if os.getpid() != _installed_by:
        return
    _asked = True
    if not _deferred:
        _stopping = True
        raise StoppedNow(EXIT_PREEMPTED)


def install() -> None:
    """Stop this stage cleanly on SIGTERM, SIGINT and SIGHUP, and when ``align run`` dies.

    During training (``stops_between_steps``) a signal is only recorded; elsewhere it raises
    StoppedNow immediately.
    """
    global _installed_by
    _installed_by = os.getpid()
    signal.signal(signal.SIGTERM, _ask)
    signal.signal(signal.SIGINT, _ask)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, _ask)
    if PARENT in os.environ:
        pid, _, started = os.environ[PARENT].partition(":")
        watched = [(int(pid), started)]
    else:
        watched = _launchers() if "RANK" in os.environ else []
    for process in watched:
        threading.Thread(target=_watch_parent, args=process, daemon=True).start()


def _launchers() -> list[tuple[int, str]]:
    """Return the launcher that started this rank, and the one above it.

    DeepSpeed's runner starts a second launcher. A signal to the runner ends it alone, and the rest
    would go on as orphans.
    """
    found, pid = [], os.getppid()
    while len(found) < 2 and (started := started_at(pid)) is not None:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        if not any(name in words for name in _LAUNCHERS):
            break
        found.append((pid, started))
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def _watch_parent(pid: int, started: str) -> None:
    """Wait until a process is gone, then terminate this one, and kill it if it does not stop."""
    # Compare start times too, since the id of a dead process may be assigned again.
    while started_at(pid) == started:
        time.sleep(1.0)
    # The main thread is addressed, because a signal to the process may go to any thread and then
    # does not interrupt what the main thread waits in. It is sent until the handler has run: one
    # that arrives just before a system call is seen only after that call.
    deadline = time.monotonic() + ORPHAN_GRACE_S
    while not _asked and time.monotonic() < deadline:
        signal.pthread_kill(_main_thread(), signal.SIGTERM)
        time.sleep(1.0)
    time.sleep(max(deadline - time.monotonic(), 0.0))
    os.kill(os.getpid(), signal.SIGKILL)


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


def defer_stop() -> None:
    """Only record signals from now on."""
    global _deferred
    _deferred = True


@contextmanager
def stop_deferred() -> Iterator[None]:
    """Only record signals inside the block."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def stops_between_steps(train: Callable[P, T]) -> Callable[P, T]:
    """Return ``train`` so that signals wait for its ``stop_requested``, and for its end."""

    @wraps(train)
    def trained(*args: P.args, **options: P.kwargs) -> T:
        with stop_deferred():
            found = train(*args, **options)
        if stop_requested():
            raise Preempted("stopped by a signal after the last step; run again to finish")
        return found

    return trained


def is_stopping() -> bool:
    """Return True once StoppedNow was raised, also if another error has replaced it since."""
    return _stopping


def was_asked() -> bool:
    """Return True if this rank was asked to stop."""
    return _asked


def stop_requested() -> bool:
    """Return True on every rank if any rank was asked to stop."""
    # A launcher may signal ranks at different steps; all must stop after the same one.
    return distributed.global_max(float(_asked)) > 0.0
