"""The part of ``align run`` in the processes of the other ranks: start what rank 0 names.

``python -m align.pipeline.follow`` is what a hostfile starts over ssh; its seat and environment
come as one line of JSON on its standard input.
"""

import hashlib
import json
import os
import queue
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from align.core.accelerator import has_gpu
from align.core.errors import AlignError, DeviceError, Preempted
from align.core.seats import Seat
from align.pipeline.channel import Channel
from align.pipeline.nodes import JOIN_S, LAST_WORDS_S, introduction
from align.pipeline.processes import POLL_S, Signals, stage_env
from align.pipeline.spread import Order, Ranks

VISIBLE_S = 60.0
"""Network file systems show a new file to other machines after up to half a minute."""


def follow(seat: Seat) -> int:
    """Run the ranks of this process in every stage that rank 0 starts; return the run's exit code.

    Raises:
        DeviceError: rank 0 cannot be reached, refuses, or has gone.
        Preempted: a signal came before rank 0 was reached.
    """
    with Signals() as signals:
        channel = _join(seat, signals)
        messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=_read, args=(channel, messages), daemon=True).start()
        follower = _Follower(seat, channel, signals)
        try:
            return follower.obey(messages)
        finally:
            follower.close()
            channel.close()


def _join(seat: Seat, signals: Signals) -> Channel:
    """Connect to rank 0, which may be started later."""
    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            channel = Channel(socket.create_connection((seat.address, seat.port), timeout=10.0))
        except OSError as error:
            if signals.count:
                raise Preempted("stopped by a signal before rank 0 was reached") from None
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"rank {seat.rank} cannot reach rank 0 at {seat.address}:{seat.port} "
                    f"({error.strerror or error}). Check the address, the port and the network"
                ) from None
            time.sleep(POLL_S)
            continue
        channel.send(**introduction(seat))
        return channel


def _read(channel: Channel, messages: "queue.Queue[dict[str, Any] | None]") -> None:
    for message in channel.messages():
        messages.put(message)
    messages.put(None)


class _Follower:
    """The ranks of this process, and what rank 0 has been told of them."""

    def __init__(self, seat: Seat, channel: Channel, signals: Signals) -> None:
        self._seat, self._channel, self._signals = seat, channel, signals
        self._ranks: Ranks | None = None
        self._log = tempfile.NamedTemporaryFile(prefix="align-rank-")  # noqa: SIM115
        self._told = 0
        self._stopping = self._asked = False

    def obey(self, messages: "queue.Queue[dict[str, Any] | None]") -> int:
        """Do what rank 0 says until it ends the run."""
        while True:
            try:
                message = messages.get(timeout=POLL_S)
            except queue.Empty:
                message = {}
            if message is None:
                raise DeviceError(
                    f"rank {self._seat.rank}: the align run of rank 0 on {self._seat.address} has "
                    "ended, or its machine or the network has failed"
                )
            if "refused" in message:
                raise DeviceError(f"rank {self._seat.rank}: {message['refused']}")
            if "end" in message:
                return int(message["end"])
            if "start" in message:
                self._start(message)
            if "kill" in message and self._ranks is not None:
                self._ranks.kill()
            self._stopping = self._stopping or "stop" in message
            self._report()

    def _start(self, message: dict[str, Any]) -> None:
        words = message["start"]
        order = Order(**{**words, "arguments": tuple(words["arguments"])})
        self._stopping = False
        if (problem := _not_visible(Path(order.resolved), message["sha256"])) is not None:
            self._channel.send(problem=problem)
            return
        share = self._seat.local_world
        env = stage_env(ranks=share, threads=order.threads, on_gpu=has_gpu())
        log = Path(self._log.name)
        self._ranks = Ranks(self._seat, order, port=message["port"], log=log, env=env)

    def _report(self) -> None:
        """Send rank 0 a signal to this process, new lines of the log, and the ranks that ended."""
        if self._signals.count and not self._asked:
            self._asked = True
            self._channel.send(asked=self._signals.last)
        if self._ranks is None:
            return
        if self._stopping:
            self._ranks.ask_to_stop()
        ended = list(self._ranks.ended())
        # The log first: the stage may be over with the last rank's end.
        self._tell_log()
        for rank, code in ended:
            self._channel.send(ended=rank, code=code)

    def _tell_log(self) -> None:
        self._log.seek(self._told)
        while block := self._log.read(2**16):
            self._told += len(block)
            # A character may be in two blocks, so the bytes must arrive as they are.
            self._channel.send(log=block.decode(errors="surrogateescape"))

    def close(self) -> None:
        """End the ranks: ask them first if rank 0 has gone while they train."""
        if self._ranks is not None and self._ranks.running:
            self._ranks.ask_to_stop()
            deadline = time.monotonic() + LAST_WORDS_S
            while self._ranks.running and time.monotonic() < deadline:
                time.sleep(POLL_S)
                list(self._ranks.ended())
            self._ranks.kill()
            list(self._ranks.ended())
        self._log.close()


def _not_visible(resolved: Path, sha256: str) -> str | None:
    """Return why the ranks cannot start: this machine does not see the run's folder."""
    deadline = time.monotonic() + VISIBLE_S
    while True:
        try:
            if hashlib.sha256(resolved.read_bytes()).hexdigest() == sha256:
                return None
        except OSError:
            pass
        if time.monotonic() > deadline:
            return (
                f"does not see {resolved.resolve()} as rank 0 has written it. The run's folder "
                "must be on a file system that all machines share, under the same path"
            )
        time.sleep(POLL_S)


def main() -> int:
    """Read seat and environment from standard input and follow rank 0."""
    words = json.loads(sys.stdin.readline())
    os.environ.update(words["env"])
    try:
        return follow(Seat(**words["seat"]))
    except AlignError as error:
        sys.stdout.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
