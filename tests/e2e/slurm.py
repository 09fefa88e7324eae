"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align.pipeline.processes import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue")
PLACES = f"{os.environ.get('PATH', '')}:/usr/sbin"
CONFIGURATION = """\
ClusterName=align
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1 State=UNKNOWN
PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why no cluster can be started here, None if one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    absent = [name for name in TOOLS if shutil.which(name, path=PLACES) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else None


@dataclass
class Cluster:
    """The cluster, its files in one folder and its daemons as children of this process."""

    folder: Path
    daemons: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self) -> "Cluster":
        for name in ("", "state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = {"port": free_port(), "first": free_port(), "second": free_port()}
        named = {"host": socket.gethostname(), "folder": self.folder, **ports}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**named))
        munge = [f"--{k}={self.folder / v}" for k, v in MUNGE.items()]
        self._begin("munged", "--foreground", "--force", *munge)
        self._wait(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._begin("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._begin("slurmd", "-D", "-N", node)
        self._wait(lambda: self.call("sinfo", "-h", "-o", "%T %D") == "idle 2", "the nodes")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([*_found("scancel"), "-u", "root"], env=self.environment, check=False)
        deadline = time.monotonic() + 120
        while self.call("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=60)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables with which Slurm's commands reach this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PLACES}

    def call(self, name: str, *words: str) -> str:
        """Return what one of Slurm's commands says."""
        done = subprocess.run(
            [*_found(name), *words], env=self.environment, capture_output=True, text=True
        )
        return done.stdout.strip()

    def _begin(self, name: str, *words: str) -> None:
        with (self.folder / "daemons.txt").open("a") as said:
            self.daemons.append(
                subprocess.Popen(
                    [*_found(name), *words], env=self.environment, stdout=said, stderr=said
                )
            )

    def _wait(self, is_ready: object, what: str) -> None:
        deadline = time.monotonic() + 300
        while not is_ready():  # type: ignore[operator]
            said = (self.folder / "daemons.txt").read_text()
            assert all(d.poll() is None for d in self.daemons), said
            assert time.monotonic() < deadline, f"{what} not ready: {said}"
            time.sleep(0.2)


MUNGE = {
    "socket": "munge.sock",
    "key-file": "munge.key",
    "pid-file": "munge.pid",
    "log-file": "munge.log",
    "seed-file": "munge.seed",
}


def _found(name: str) -> Sequence[str]:
    found = shutil.which(name, path=PLACES)
    assert found is not None, name
    return [found]
