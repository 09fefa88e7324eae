"""Stage processes by fork: the libraries are imported once, and each run costs its work alone."""

import gc
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from align.pipeline.processes import free_port

LIMIT_S = 300.0
"""A run that is not over by then hangs; it is killed and has failed."""
HANGS = -1000
"""Exit code of a run that had to be ended after ``LIMIT_S``."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "ALIGN_DISK_WAIT_S": "1",
}
MODULES = (
    *("deepspeed", "trl", "peft", "datasets", "align.stages.base", "align.cli"),
    *("transformers.models.qwen2.modeling_qwen2", "align.sampling.hf", "align.stages.sft"),
    *("align.stages.base_model", "align.stages.dpo", "align.stages.kto", "align.stages.classify"),
    *("align.stages.reward.stage", "align.stages.online", "align.stages.trl.stage"),
    *("align.stages.merge", "align.stages.data.curate", "align.stages.data.weak_label"),
    *("align.stages.data.self_instruct", "trl.experimental.kto"),
)


def preload(*, vllm: bool) -> None:
    """Import once what every run needs; nothing is computed, so forking stays safe."""
    os.environ.update(ENVIRONMENT)
    if vllm:
        os.environ.update(import_module("align.sampling.vllm_start").ENVIRONMENT)
    for module in (*MODULES, "vllm") if vllm else MODULES:
        import_module(module)
    # A table of patterns that transformers compiles at the first model it loads.
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("qwen2")
    # What the collector does not touch, the forks share.
    gc.collect()
    gc.freeze()


@dataclass(frozen=True, slots=True)
class Run:
    """A forked run: one process for each rank, and the log that they share."""

    pids: tuple[int, ...]
    log: Path
    began: float
    began_at: float

    def kill(self, ranks: Sequence[int] | None = None, signum: int = signal.SIGKILL) -> None:
        """Send a signal to some ranks, or to all."""
        for i, pid in enumerate(self.pids):
            if ranks is None or i in ranks:
                os.kill(pid, signum)  # not reaped yet, so the id is still its own

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Return the exit codes of all ranks, negative for signals; ``HANGS`` if one went on."""
        until = time.monotonic() + limit_s
        codes = []
        for pid in self.pids:
            if not _ended(pid, until - time.monotonic()):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes.append(HANGS)
                continue
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return codes

    def wait_until(self, seconds: float) -> bool:
        """Wait until so long after the start; return False if rank 0 ended before."""
        left = self.began + seconds - time.monotonic()
        return not _ended(self.pids[0], max(left, 0.0))

    def seconds(self) -> float:
        """Return how long a finished run took: until its log was written last."""
        return self.log.stat().st_mtime - self.began_at

    def said(self) -> str:
        """Return everything that the ranks wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def wait_for(pid: int, limit_s: float = LIMIT_S) -> bool:
    """Wait until a process ended, without reaping it; return whether it did in time."""
    return _ended(pid, limit_s)


def _ended(pid: int, seconds: float) -> bool:
    fd = os.pidfd_open(pid)
    try:
        return bool(select.select([fd], [], [], max(seconds, 0.0))[0])
    finally:
        os.close(fd)


def start(
    body: Callable[[], object],
    folder: Path,
    *,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    log: str = "said.txt",
) -> Run:
    """Fork ``ranks`` processes that call ``body`` in ``folder``, each in a session of its own."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path, pids, began, began_at = folder / log, [], time.monotonic(), time.time()
    path.touch()  # a rank that is killed at once has not opened it
    for rank in range(ranks):
        more = dict(environment or {})
        if ranks > 1:
            more |= world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        pid = os.fork()
        if pid == 0:
            _become(body, folder, path, more)
        pids.append(pid)
    return Run(tuple(pids), path, began, began_at)


def _become(
    body: Callable[[], object], folder: Path, log: Path, environment: Mapping[str, str]
) -> None:
    """Call ``body`` in this new process and leave it, whatever happens."""
    code = 99
    try:
        os.setsid()
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for standard in (1, 2):
            os.dup2(fd, standard)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)
        os.chdir(folder)
        os.environ.update(environment)
        body()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def start_stage(
    folder: Path,
    stage: str,
    kind: str,
    *,
    ranks: int = 1,
    hook: Callable[[], object] | None = None,
    log: str = "said.txt",
) -> Run:
    """Start one stage of a workplace as its process: ``python -m align.stages KIND ...``."""

    def body() -> None:
        from align.stages.base import main

        if hook is not None:
            hook()
        sys.argv = ["align.stages", kind, "--recipe", "recipe.yaml", "--stage", stage]
        sys.argv += ["--run-dir", "run"]
        main()

    return start(body, folder, ranks=ranks, log=log)
