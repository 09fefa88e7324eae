"""Two network namespaces as two machines, with a link between them and sshd on the second."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

LIMIT_S = 1200.0
LINK = "align0"
"""Name of the network device inside each machine."""


def missing_tools(*names: str) -> str | None:
    """Return why several machines cannot be simulated here, None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for name in names:
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            return f"{name} is not installed"
    probe = f"align-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces cannot be made here ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


@dataclass
class Machines:
    """Two machines; their processes share the files of this one."""

    folder: Path
    names: tuple[str, str] = field(default=("", ""))
    addresses: tuple[str, str] = ("10.77.0.1", "10.77.0.2")
    started: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self) -> "Machines":
        self.names = (f"align-a-{os.getpid()}", f"align-b-{os.getpid()}")
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", LINK, "netns", first, *("type", "veth", "peer", LINK, "netns", second))
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            _ip("-n", name, "link", "set", LINK, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in self.names:
            pids = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=True
            ).stdout.split()
            for pid in pids:
                subprocess.run(["kill", "-9", pid], check=False)
            _ip("netns", "del", name)

    def start(self, number: int, argv: Sequence[str], **environment: str) -> subprocess.Popen:
        """Start a command on one of the machines."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *argv],
            env={**os.environ, "GLOO_SOCKET_IFNAME": LINK, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def cut(self) -> None:
        """Take the network from the second machine, as when it loses power."""
        _ip("-n", self.names[1], "link", "set", LINK, "down")

    def sshd(self) -> str:
        """Start sshd on the second machine; return the ssh command that reaches it."""
        folder = self.folder / "ssh"
        folder.mkdir(mode=0o700)
        for key in ("host", "user"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(argv, check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        (folder / "config").write_text(
            f"HostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'user.pub'}\n"
            "Port 22\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\n"
            f"PidFile {folder / 'pid'}\n"
        )
        sshd = shutil.which("sshd", path="/usr/sbin")
        assert sshd is not None
        self.start(1, [sshd, "-D", "-e", "-f", str(folder / "config")])
        options = ("BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null")
        named = " ".join(f"-o {option}" for option in (*options, "LogLevel=ERROR"))
        return f"ssh -F none {named} -i {folder / 'user'}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def end(processes: Sequence[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Return exit codes and outputs after all have ended."""
    said = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    return [process.returncode for process in processes], said


def align(*words: str) -> list[str]:
    """Return the command line of ``align``."""
    return [sys.executable, "-m", "align", *words]
