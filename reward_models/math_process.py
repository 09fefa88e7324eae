"""Symbolic comparison in a process of its own: sympy can hang or eat memory on made-up input.

``python -m reward_models.math_process`` is the worker: one JSON request per line on stdin, one
JSON reply per line on stdout. `LatexVerifier` starts it, reuses it, and kills it at the time limit.
"""

import importlib.util
import logging
import resource
from collections.abc import Mapping
from typing import Any

from reward_models.base import InvalidScoreError
from reward_models.worker import Worker, WorkerError, serve

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
        self.worker = Worker(
            "reward_models.math_process", start_timeout_s=START_TIMEOUT_S, name="verifier"
        )

    def score(self, answer: str, value: Any) -> float:
        """Return 1.0 where the answer's final expression equals the reference, else 0.0.

        Raises:
            InvalidScoreError: at the time limit, or where the worker or math-verify fails.
        """
        request = {"answer": answer, "reference": str(value)}
        try:
            reply = self.worker.ask(request, self.timeout_s)
        except WorkerError as error:
            raise InvalidScoreError(str(error)) from None
        if "invalid" in reply:
            raise InvalidScoreError(reply["invalid"])
        return reply["score"]


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


def _prepare() -> tuple[str, Any]:
    import math_verify  # noqa: F401  (its seconds of import come before the first time limit)

    # It warns that its own time limit is off; here the process that waits holds the limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return "ready", _reply


def _reply(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return compare(**request)
    # Whatever sympy raises on made-up input is reported to the caller, who counts it.
    except Exception as error:
        return {"invalid": f"verifier: {type(error).__name__}"}


if __name__ == "__main__":
    serve(_prepare, limit=(resource.RLIMIT_AS, MEMORY_BYTES))
