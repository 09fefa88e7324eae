"""The ranks of one stage on several machines: started, watched, stopped and ended together."""

import hashlib
import queue
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from align.core.errors import EXIT_FAILED, EXIT_OK, EXIT_USER
from align.core.seats import Seat
from align.pipeline.nodes import LAST_WORDS_S, Member, Party, spans
from align.pipeline.processes import STAGE_MODULE, StageProcess, free_port

END_S = 10.0
"""How long killed ranks on other machines have to end."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the ranks of a stage are started with.

    Attributes:
        arguments: command line of the module.
        ranks: their number.
        module: the module.
        threads: CPU threads of one rank; None divides the cores of each machine.
        resolved: the resolved recipe, which every machine must see.
    """

    arguments: tuple[str, ...]
    ranks: int
    module: str = STAGE_MODULE
    threads: int | None = None
    resolved: str = ""


class Ranks:
    """The ranks of one process in one stage."""

    def __init__(
        self, seat: Seat, order: Order, *, port: int, log: Path, env: dict[str, str]
    ) -> None:
        """Start those of them that the stage has."""
        argv = [sys.executable, "-u", "-m", order.module, *order.arguments]
        self._running: dict[int, StageProcess] = {}
        for position in range(min(seat.count, order.ranks - seat.rank)):
            own = seat.rank_environment(env, position, ranks=order.ranks, port=port)
            process = StageProcess(argv, env=own, log=log, module=order.module)
            self._running[seat.rank + position] = process

    @property
    def running(self) -> bool:
        """Return whether one has not ended."""
        return bool(self._running)

    def ended(self) -> Iterator[tuple[int, int]]:
        """Yield rank and exit code of each that has ended since the last call."""
        for rank, process in list(self._running.items()):
            code = process.wait(0)
            if code is not None:
                process.close()
                del self._running[rank]
                yield rank, code

    def ask_to_stop(self) -> None:
        """Send SIGTERM to those that did not get it yet."""
        for process in self._running.values():
            process.ask_to_stop()

    def memory_gib(self) -> float:
        """Return the resident memory of those that run."""
        return sum(process.memory_gib() for process in self._running.values())

    def kill(self) -> None:
        """Kill those that remain."""
        for process in self._running.values():
            process.kill()


class SpreadStage:
    """A running stage whose ranks are on several machines; used like a StageProcess."""

    def __init__(self, party: Party, order: Order, *, log: Path, env: dict[str, str]) -> None:
        """Start its ranks."""
        self._party, self.folder = party, log.parent
        self._log = log.open("ab")
        self.log_start = self._log.tell()
        self.place = ""
        self._codes: dict[int, int] = {}
        self._first: tuple[int, int] | None = None
        self._failed_at = 0.0
        self._killed = self._asked = False
        self._count = order.ranks
        self._hosts = {r: m.host for m in party.members for r in m.ranks}
        port = free_port()
        digest = hashlib.sha256(Path(order.resolved).read_bytes()).hexdigest()
        words = {name: getattr(order, name) for name in Order.__dataclass_fields__}
        party.send(start=words, port=port, sha256=digest)
        self._mine = Ranks(party.seat, order, port=port, log=log, env=env)
        for member in party.lost:  # since an earlier stage
            self._lose(member)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end; return the exit code, or None if a rank is still running."""
        deadline = time.monotonic() + timeout_s
        while True:
            for rank, code in self._mine.ended():
                self._note(rank, code)
            self._hear(min(timeout_s, 0.05))
            if len(self._codes) == self._count:
                return self._result()
            if self._failed_at and time.monotonic() > self._failed_at + LAST_WORDS_S:
                self.kill()
            if time.monotonic() >= deadline:
                return None

    def _hear(self, timeout_s: float) -> None:
        """Handle what the other processes have said."""
        while True:
            try:
                member, message = self._party.events.get(timeout=timeout_s)
            except queue.Empty:
                return
            if message is None:
                self._lose(member)
            elif "log" in message:
                self._write(str(message["log"]).encode(errors="surrogateescape"))
            elif "ended" in message:
                self._note(int(message["ended"]), int(message.get("code", EXIT_FAILED)))
            elif "problem" in message:
                self._write(f"{member.host}: {message['problem']}\n".encode(errors="replace"))
                for rank in member.ranks:
                    self._note(rank, EXIT_USER)
            timeout_s = 0.001

    def _lose(self, member: Member) -> None:
        text = (
            f"{member.host}: lost. Its align run has ended, or the machine or the network has "
            f"failed; its ranks: {spans(member.ranks)}\n"
        )
        self._write(text.encode(errors="replace"))
        # A rank that has ended before has its code; the others can never tell theirs.
        for rank in member.ranks:
            self._note(rank, EXIT_FAILED)
        if member not in self._party.lost:
            self._party.lost.append(member)

    def _write(self, text: bytes) -> None:
        self._log.write(text)
        self._log.flush()

    def _note(self, rank: int, code: int) -> None:
        """Keep a rank's exit code; the first failure is the stage's."""
        if rank >= self._count or rank in self._codes:
            return
        self._codes[rank] = code
        if code == EXIT_OK or self._killed:
            return
        # Ranks that lose another one may end, with an error, before the loss itself is seen.
        if self._first is None or (code == -signal.SIGKILL and self._first[1] == EXIT_FAILED):
            self._first = rank, code
        self._failed_at = self._failed_at or time.monotonic()

    def _result(self) -> int:
        if self._first is None:
            return EXIT_FAILED if self._killed else EXIT_OK
        rank, code = self._first
        self.place = f"rank {rank} on {self._hosts.get(rank, socket.gethostname())}: "
        return code

    def ask_to_stop(self) -> None:
        """Ask every rank on every machine to stop; call again until the stage ends."""
        self._mine.ask_to_stop()
        if not self._asked:
            self._asked = True
            self._party.send(stop=True)

    def memory_gib(self) -> float:
        """Return the resident memory of the ranks on this machine that this process runs."""
        return self._mine.memory_gib()

    def kill(self) -> None:
        """Kill all ranks on all machines."""
        self._killed = True
        self._mine.kill()
        self._party.send(kill=True)

    def close(self) -> None:
        """Kill stragglers after the end and close the log."""
        if len(self._codes) < self._count:
            self.kill()
            deadline = time.monotonic() + END_S
            while len(self._codes) < self._count and time.monotonic() < deadline:
                self.wait(0.2)
        self._log.close()
