"""Reward for mathematics: the final number, or LaTeX expression, of a response is the right one.

The final answer is what follows the last of ``####``, ``\\boxed{...}`` and "answer is"; without
such a marker it is the last line, or else the last number of the text. What was thought before the
end of a block ``<think>`` is not looked at.
"""

import re
from typing import Any

from reward_models.base import InvalidScoreError, Rule, rule_from_spec
from reward_models.math_process import LatexVerifier
from reward_models.numbers import MAX_STATEMENT, Number, holds_digits, last_number, read_number
from reward_models.specs import MathSpec

_MARKER = re.compile(r"####|\\(?:boxed|fbox)\s*\{|\banswers?[*_]*\s*(?:is\b|[:=])", re.IGNORECASE)
_THINK = re.compile(r"<(/?)(?:think|thinking|reasoning|thought)>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][\w-]*>|<\|[^|<>]*\|>")
_DISPLAY = re.compile(r"\$\$|\\[\[\]]")
_CLAUSE_END = re.compile(
    r"[.!?;](?:\s+|$)|,\s+(?=[^\W\d_])|\s\((?=[^\W\d_])"
    r"|\s(?:because|since|as|so|which|where|for)\s",
    re.IGNORECASE,
)


def _braced(text: str, start: int) -> str:
    """Return what stands between the brace opened just before ``start`` and its partner."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return text[start:]


def final_number(text: str) -> Number | None:
    """Return the final number of a response, exactly.

    A marked answer must be one number: beside it only words, a unit and punctuation may stand.
    The first clause with digits counts, so listing several candidates gains nothing. Read are
    signs, thousands, decimals, exponents, powers, fractions, mixed numbers, currency and percent.

    Returns:
        The number, or None where there is none (a marker without a number has none).
    """
    thoughts = list(_THINK.finditer(text))
    if thoughts and not thoughts[-1][1]:  # still thinking where it was cut
        return None
    text = text[thoughts[-1].end() :] if thoughts else text
    text = _DISPLAY.sub(" ", _TAG.sub(" ", text))
    markers = list(_MARKER.finditer(text))
    if not markers:
        line = _last_line(text)
        return read_number(line) or last_number(line)
    last = markers[-1]
    if last.group().endswith("{"):
        return read_number(_braced(text, last.end()), is_latex=True)
    rest = text[last.end() :].lstrip(" \t\n\r:*_=$")
    line = rest.split("\n", 1)[0][:MAX_STATEMENT]
    clause = next((c for c in _CLAUSE_END.split(line) if holds_digits(c)), None)
    if clause is not None:
        return read_number(clause)
    # "The answer is this:", and the number by itself at the end.
    return None if last.group() == "####" else read_number(_last_line(rest))


def _last_line(text: str) -> str:
    """Return the last line with digits, empty where there is none."""
    return next((line for line in reversed(text.splitlines()) if holds_digits(line)), "")


def same_number(answer: Number, reference: Number) -> bool:
    """Return whether two numbers are equal.

    Where only one has a percent sign, both readings count: 50% answers 50 and 0.5.
    """
    if answer.value == reference.value:
        return True
    if answer.is_percent == reference.is_percent:
        return False
    scaled = [n.value / 100 if n.is_percent else n.value for n in (answer, reference)]
    return scaled[0] == scaled[1]


def reference_number(value: Any) -> Number:
    """Return the one number that a reference is; a worked solution ends with a marker.

    Raises:
        InvalidScoreError: it is no number, several, or an expression.
    """
    text = str(value)
    found = final_number(text) if _MARKER.search(text) else read_number(text)
    if found is not None:
        return found
    if not holds_digits(text) and text.replace(" ", "").isalpha():
        raise InvalidScoreError("reference holds no number")
    raise InvalidScoreError("reference is not one number; use latex: true")


def _number_score(answer: str, value: Any) -> float:
    reference = reference_number(value)
    found = final_number(answer)
    return float(found is not None and same_number(found, reference))


def build_math(spec: MathSpec) -> Rule:
    """Build the reward that compares the final number, or with ``latex`` the final expression.

    Args:
        spec: ``column`` of the reference, ``latex``, ``timeout_s`` (seconds for one answer).

    Raises:
        ValueError: if ``latex`` is set and math-verify is not installed.
    """
    function = _number_score
    if spec.latex:
        function = LatexVerifier(timeout_s=spec.timeout_s).score
    return rule_from_spec(spec, function, column=spec.column)
