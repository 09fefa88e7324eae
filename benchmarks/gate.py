"""A side's end of the pipe: let a training loop go on by one round, and say how long it took."""

import json
import os
import resource
import sys
import time
from typing import Any


class Gate:
    """A gate that stops a training loop between rounds.

    A round begins when the harness says so and ends with the loop's next log line; in between the
    other side runs, so that only one of them computes at a time.
    """

    def __init__(self) -> None:
        # Libraries print: keep the pipe for the protocol and send the rest to standard error.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = self._cpu = 0.0

    def wait(self) -> None:
        """Block until the next round is to begin; end the process when there is none."""
        if sys.stdin.readline().strip() != "go":
            sys.stdout.flush()
            os._exit(0)
        self._cpu, self._began = time.process_time(), time.perf_counter()

    def done(self, **facts: Any) -> None:
        """Report the round that ends now, then wait for the next."""
        seconds = time.perf_counter() - self._began
        cpu_s = time.process_time() - self._cpu
        self._send({"seconds": seconds, "cpu_s": cpu_s, "peak_mib": peak_mib(), **facts})
        self.wait()

    def ready(self) -> None:
        """Report that everything is built, then wait for the first round."""
        self._send({"ready": True})
        self.wait()

    def _send(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def peak_mib() -> float:
    """Return this process's peak memory: on the GPU if there is one, otherwise resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
