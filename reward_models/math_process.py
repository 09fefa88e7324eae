"""Symbolic comparison in a process of its own: sympy can hang or eat memory on made-up input.

``python -m reward_models.math_process`` is the worker: one JSON request per line on stdin, one
JSON reply per line on stdout. `LatexVerifier` starts it, reuses it, and kills it at the time limit.
"""

import importlib.util
import json
import logging
import os
import resource
import select
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from reward_models.base import InvalidScoreError

START_TIMEOUT_S = 120.0
"""Seconds the worker may take to import sympy on a busy machine; no answer is charged for it."""
MEMORY_BYTES = 4 * 2**30
"""Address space of the worker; beyond it the answer is invalid, not the machine out of memory."""


class LatexVerifier:
    """Compare answers with math-verify under a time limit.

    Args:
        timeout_s: seconds for one answer; the worker is killed then and started again.

    Raises:
        ValueError: if math-verify is not installed.
    """

    def __init__(self, *, timeout_s: float) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "reward 'math': latex needs the package math-verify, which is not installed; "
                "install it or remove 'latex: true'"
            )
        self.timeout_s = timeout_s
        self._worker: subprocess.Popen[bytes] | None = None

    def score(self, answer: str, value: Any) -> float:
        """Give 1.0 where the answer's final expression equals the reference, else 0.0.

        Raises:
            InvalidScoreError: at the time limit, or where the worker or math-verify fails.
        """
        worker = self._running()
        assert worker.stdin is not None
        request = json.dumps({"answer": answer, "reference": str(value)}) + "\n"
        try:
            worker.stdin.write(request.encode())
            worker.stdin.flush()
            reply = json.loads(self._line(worker, self.timeout_s))
        except TimeoutError:
            self.close()
            raise InvalidScoreError("verifier timed out") from None
        except (BrokenPipeError, EOFError):
            self.close()
            raise InvalidScoreError("verifier died") from None
        if "invalid" in reply:
            raise InvalidScoreError(reply["invalid"])
        return reply["score"]

    def close(self) -> None:
        """Kill the worker; the next answer starts another."""
        if self._worker is not None:
            _kill(self._worker)
            self._worker = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, os.environ.get("PYTHONPATH", "")]
        worker = subprocess.Popen(
            [sys.executable, "-m", "reward_models.math_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)},
        )
        weakref.finalize(self, _kill, worker)
        try:
            self._line(worker, START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            _kill(worker)
            raise InvalidScoreError("verifier did not start") from error
        self._worker = worker
        return worker

    @staticmethod
    def _line(worker: subprocess.Popen[bytes], timeout_s: float) -> bytes:
        """Read one line from the worker, unbuffered so that select sees what is there."""
        deadline = time.monotonic() + timeout_s
        assert worker.stdout is not None
        handle = worker.stdout.fileno()
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(handle, 65536)
            if not chunk:
                raise EOFError
            line += chunk
        return line


def _kill(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:  # unsent bytes for a process that is gone
            continue


def _reference(parse: Any, text: str) -> list[Any]:
    text = text.rsplit("####", 1)[-1].strip()
    has_delimiter = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
    return parse(text if has_delimiter else f"${text}$", parsing_timeout=None)


def compare(answer: str, reference: str) -> dict[str, Any]:
    """Compare in this process, without a time limit.

    math-verify takes several boxed answers together as one set, so listing candidates is wrong.

    Returns:
        ``{"score": 0.0 or 1.0}``, or ``{"invalid": reason}`` for an unreadable reference.
    """
    from math_verify import parse, verify

    gold = _reference(parse, reference)
    if not gold:
        return {"invalid": "reference holds no expression"}
    found = parse(answer, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return {"score": float(bool(found) and verify(gold, found, timeout_seconds=None))}


def serve() -> None:
    """Answer requests until stdin ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import math_verify  # noqa: F401  (its seconds of import come before the first time limit)

    # It warns that its own time limit is off; here the process that waits holds the limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies.write('"ready"\n')
    replies.flush()
    for line in sys.stdin:
        try:
            reply = compare(**json.loads(line))
        # Whatever sympy raises on made-up input is reported to the caller, who counts it.
        except Exception as error:
            reply = {"invalid": f"verifier: {type(error).__name__}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve()
