"""Symbolic comparison in a separate process, since sympy can hang or exhaust memory.

``python -m reward_models.math_process`` is the worker: one JSON request per line on stdin, one
JSON reply per line on stdout. `LatexVerifier` starts it, reuses it, and kills it at the time limit.
"""

import importlib.util
import logging
import re
import resource
from collections.abc import Callable, Mapping
from typing import Any

from reward_models.base import InvalidScoreError
from reward_models.worker import Worker, WorkerError, serve

START_TIMEOUT_S = 120.0
"""Seconds for the worker to import sympy on a busy machine, not counted for any response."""
NO_EXPRESSION = "reference contains no expression"
MEMORY_BYTES = 4 * 2**30
"""Address space of the worker; a response that needs more is invalid."""


class UnreadableReferenceError(InvalidScoreError):
    """Raised if math-verify finds no expression in a reference."""


class LatexVerifier:
    """Compare responses with math-verify under a time limit.

    Args:
        timeout_s: seconds per response; then the worker is killed and restarted.

    Raises:
        ValueError: math-verify is not installed.
    """

    def __init__(self, *, timeout_s: float) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "reward 'math': latex needs the package math-verify, which is not installed. "
                "Install it or remove 'latex: true'."
            )
        self.timeout_s = timeout_s
        self.worker = Worker(
            "reward_models.math_process", start_timeout_s=START_TIMEOUT_S, name="verifier"
        )

    def score(self, answer: str, value: object) -> float:
        """Return 1.0 if the response's final expression equals the reference, else 0.0.

        Raises:
            InvalidScoreError: the time limit was reached, or the worker or math-verify failed.
        """
        request = {"answer": answer, "reference": str(value)}
        try:
            reply = self.worker.ask(request, self.timeout_s)
        except WorkerError as error:
            raise InvalidScoreError(str(error)) from None
        if reply.get("invalid") == NO_EXPRESSION:
            raise UnreadableReferenceError(NO_EXPRESSION)
        if "invalid" in reply:
            raise InvalidScoreError(reply["invalid"])
        return reply["score"]


def _reference(parse: Callable[..., list[Any]], text: str) -> list[Any]:
    text = text.rsplit("####", 1)[-1].strip()
    return parse(text if _delimited(text) else f"${text}$", parsing_timeout=None)


def compare(answer: str, reference: str) -> dict[str, Any]:
    """Compare in this process, without a time limit.

    math-verify treats several boxed answers as one set, so listing candidates is incorrect.

    Returns:
        ``{"score": 0.0 or 1.0}``, or ``{"invalid": reason}`` for an unreadable reference.
    """
    from math_verify import parse, verify

    # An unreadable reference is not evidence about the response: invalid, not 0.
    gold = _reference(parse, reference)
    if not gold:
        return {"invalid": NO_EXPRESSION}
    # Without delimiters math-verify reads only plain numbers, so \sqrt{3} alone would be 3.
    readings = [answer, f"${answer.strip()}$"] if _is_bare(answer) else [answer]
    parsed = [parse(text, parsing_timeout=None) for text in readings]  # pyright: ignore[reportArgumentType]
    same = (bool(found) and verify(gold, found, timeout_seconds=None) for found in parsed[::-1])
    return {"score": float(any(same))}


def _is_bare(text: str) -> bool:
    """Return whether a response is one expression that no delimiter marks, without prose."""
    if _delimited(text) or "\n" in text.strip():
        return False
    return not re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", re.sub(r"\\[a-z]+", "", text))


def _delimited(text: str) -> bool:
    return any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))


def _prepare() -> tuple[str, Any]:
    import math_verify  # noqa: F401  (import it before the first time limit starts)

    # It warns that its own time limit is off; here, the waiting process enforces the limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return "ready", _reply


def _reply(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return compare(**request)
    # Any error of sympy on generated input is reported to the caller, who counts it.
    except Exception as error:
        return {"invalid": f"verifier: {type(error).__name__}"}


if __name__ == "__main__":
    serve(_prepare, limit=(resource.RLIMIT_AS, MEMORY_BYTES))
