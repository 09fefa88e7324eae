"""A run whose ranks are on several machines: rank 0's ``align run`` directs the others.

Only rank 0 reads the recipe, writes into the run's folder and shows progress. The processes of the
other ranks (``align.pipeline.follow``) connect to it, start the ranks that it names, and send it
what they say and how they end.
"""

import platform
import queue
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from align.core.artifacts import versions
from align.core.errors import EXIT_FAILED, AlignError, DeviceError, Preempted
from align.core.seats import CONTROL_PORT, Seat
from align.pipeline.channel import Channel, listen
from align.pipeline.hosts import Host, Remote
from align.pipeline.processes import Signals
from align.recipe.schema import Recipe

JOIN_S = 600.0
"""How long rank 0 and the others wait for each other before the first stage."""
HELLO_S = 20.0
LAST_WORDS_S = 20.0
"""How long the other ranks of a failed stage have to say why they end."""


def introduction(seat: Seat) -> dict[str, Any]:
    """Return what a process says of itself when it joins."""
    return {
        "hello": seat.key,
        "rank": seat.rank,
        "count": seat.count,
        "host": socket.gethostname(),
        "versions": software(),
    }


def software() -> dict[str, str]:
    """Return the versions that must be equal on all machines."""
    return {"python": platform.python_version(), **versions()}


@dataclass(frozen=True, slots=True)
class Member:
    """A process that has joined: its connection, machine and ranks."""

    channel: Channel
    host: str
    ranks: range


class Party:
    """The processes of one run, seen by that of rank 0."""

    def __init__(self, seat: Seat, signals: Signals, hosts: Sequence[Host] = ()) -> None:
        """Listen for the other processes.

        Args:
            seat: that of this process.
            signals: what this process has received; a signal to another one is counted too.
            hosts: further machines, on which the other processes are started over ssh.

        Raises:
            DeviceError: another program uses the port.
        """
        self.seat, self.signals, self._hosts = seat, signals, hosts
        self.code = EXIT_FAILED
        self.members: list[Member] = []
        self.lost: list[Member] = []
        self.events: queue.Queue[tuple[Member, dict[str, Any] | None]] = queue.Queue()
        self._remotes: list[Remote] = []
        try:
            self._listener = listen(seat.port)
        except OSError as error:
            raise DeviceError(
                f"rank 0 cannot listen on port {seat.port} of {seat.address} ({error.strerror}). "
                f"Set {CONTROL_PORT} to a free port for every rank"
            ) from None

    def gather(self) -> None:
        """Wait until every process has joined.

        Raises:
            DeviceError: one is missing, or has other software.
            Preempted: a signal came first.
        """
        first = self.seat.count
        for host in self._hosts:
            seat = replace(self.seat, rank=first, count=host.slots, local_world=host.slots)
            words = {name: getattr(seat, name) for name in Seat.__dataclass_fields__}
            self._remotes.append(Remote(host, words))
            first += host.slots
        deadline = time.monotonic() + JOIN_S
        while missing := self._missing():
            if self.signals.count:
                raise Preempted("stopped by a signal before every rank had joined")
            if (problem := self._ssh_problem()) is not None:
                raise DeviceError(f"ssh: a host of the hostfile did not join: {problem}")
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"{len(missing)} of {self.seat.world} ranks did not join rank 0 at "
                    f"{self.seat.address}:{self.seat.port} within {JOIN_S:.0f} s: "
                    f"{', '.join(map(str, missing[:8]))}. Check that their machines reach it"
                )
            self._accept(1.0)

    def _ssh_problem(self) -> str | None:
        return next((found for r in self._remotes if (found := r.problem()) is not None), None)

    def _missing(self) -> list[int]:
        present = {rank for member in self.members for rank in member.ranks}
        return [rank for rank in range(self.seat.count, self.seat.world) if rank not in present]

    def _accept(self, timeout_s: float) -> None:
        """Accept the process of the next ranks; refuse one that belongs to another run."""
        self._listener.settimeout(timeout_s)
        try:
            connection, _ = self._listener.accept()
        except OSError:  # nobody in this time
            return
        channel = Channel(connection)
        hello = channel.receive(HELLO_S) or {}
        first, count, host = (hello.get(name) for name in ("rank", "count", "host"))
        counted = isinstance(count, int) and 0 < count <= self.seat.world
        told = isinstance(first, int) and counted and isinstance(host, str)
        known = told and hello.get("hello") == self.seat.key
        ranks = range(first, first + count) if known else range(0)  # type: ignore[operator]
        if not ranks or not set(ranks) <= set(self._missing()):
            channel.send(refused="the process of rank 0 at this address belongs to another run")
            channel.close()
            return
        member = Member(channel, str(host), ranks)
        self.members.append(member)
        _refuse_other_software(member, hello.get("versions"))
        threading.Thread(target=self._read, args=(member,), daemon=True).start()

    def _read(self, member: Member) -> None:
        for message in member.channel.messages():
            if "asked" in message:  # at any time, also while a stage of one rank runs
                self.signals.forward(int(message["asked"]))
            else:
                self.events.put((member, message))
        self.events.put((member, None))

    def header(self, recipe: Recipe) -> str:
        """Return one line on the ranks of this run and what has started them."""
        places: dict[str, list[int]] = {socket.gethostname(): list(range(self.seat.count))}
        for member in sorted(self.members, key=lambda m: m.ranks.start):
            places.setdefault(member.host, []).extend(member.ranks)
        named = ", ".join(f"{host} {spans(ranks)}" for host, ranks in places.items())
        machines = f"{len(places)} machine{'s' if len(places) > 1 else ''}"
        fewer = {n: s.ranks for n, s in recipe.stages.items() if s.ranks != self.seat.world}
        rest = f"; with fewer ranks: {', '.join(f'{n} {r}' for n, r in fewer.items())}"
        return (
            f"{self.seat.world} ranks on {machines}, started by {self.seat.launcher}: {named}"
            f"{rest if fewer else ''}"
        )

    def send(self, **message: Any) -> None:
        """Send a message to every process."""
        for member in self.members:
            member.channel.send(**message)

    def close(self) -> None:
        """End the run for every process, with its exit code."""
        # First, so that a process that has not joined yet ends too.
        self._listener.close()
        self.send(end=self.code)
        for remote in self._remotes:
            remote.close()
        for member in self.members:
            member.channel.close()


def _refuse_other_software(member: Member, found: object) -> None:
    mine = software()
    theirs = found if isinstance(found, dict) else {}
    different = [n for n in sorted({*mine, *theirs}) if mine.get(n) != theirs.get(n)]
    if different:
        listed = ", ".join(
            f"{name} {theirs.get(name, 'missing')} (here {mine.get(name, 'missing')})"
            for name in different[:4]
        )
        raise DeviceError(
            f"{member.host} has other software than {socket.gethostname()}: {listed}. Install the "
            "same versions on every machine"
        )


def spans(ranks: Sequence[int]) -> str:
    """Return ranks as ``0-3`` or ``0, 2``."""
    whole = list(range(ranks[0], ranks[0] + len(ranks)))
    if list(ranks) == whole and len(ranks) > 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))


def refuse_other_number(recipe: Recipe, seat: Seat) -> None:
    """Raise DeviceError if the launcher started another number of ranks than the recipe uses."""
    name, spec = max(recipe.stages.items(), key=lambda item: item[1].ranks)
    if spec.ranks != seat.world:
        raise DeviceError(
            f"{seat.launcher}: {seat.world} ranks were started, but the most that the recipe uses "
            f"is ranks: {spec.ranks} (stage '{name}'). Start {spec.ranks}, or set the ranks of "
            f"its stages, such as --set stages.{name}.ranks={seat.world}"
        )


@contextmanager
def together(
    seat: Seat | None, signals: Signals, hosts: Sequence[Host] = ()
) -> Iterator[Party | None]:
    """Yield the processes of a run after all have joined, None if this is the only one.

    At the end, all exit with ``code`` of the party, or with that of the error.
    """
    if seat is None:
        yield None
        return
    party = Party(seat, signals, hosts)
    try:
        party.gather()
        yield party
    except AlignError as error:
        party.code = error.exit_code
        raise
    finally:
        party.close()
