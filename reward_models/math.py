"""Reward for mathematics: compare the final number or LaTeX expression with the reference.

The final answer follows the last of ``####``, ``\\boxed{...}`` and "answer is". Without such a
marker it is the last line, or else the last number of the text. Text before the end of a
``<think>`` block is ignored.
"""

import re
from dataclasses import dataclass

from reward_models.base import InvalidScoreError, Rule, rule_from_spec
from reward_models.math_process import LatexVerifier, UnreadableReferenceError
from reward_models.numbers import MAX_STATEMENT, Number, holds_digits, last_number, read_number
from reward_models.specs import MathSpec

_MARKER = re.compile(
    r"####|\\(?:boxed|fbox)(?:\s*\{|\s+(?=[-+.\d]))|\banswers?[*_]*\s*(?:is\b|[:=])", re.IGNORECASE
)
_THINK = re.compile(r"<(/?)(?:think|thinking|reasoning|thought)>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][\w-]*>|<\|[^|<>]*\|>")
_MORE = re.compile(r"^\s*>|\d\s?!")
"""A bound or a factorial: in a reference not the number itself, in prose a quote or a full stop."""
_DISPLAY = re.compile(r"\$\$|\\[\[\]]")
_CLAUSE_END = re.compile(
    r"[.!?;](?:\s+|$)|,\s+(?=[^\W\d_])|\s\((?=[^\W\d_])"
    r"|\s(?:because|since|as|so|which|where|for)\s",
    re.IGNORECASE,
)


def _braced(text: str, start: int) -> str:
    """Return the text between the brace opened just before ``start`` and its matching brace."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return text[start:]


def spoken(text: str) -> str:
    """Return a response without its thoughts; "" if it was truncated while still thinking."""
    # Numbers in a chain of thought are not the answer.
    thoughts = list(_THINK.finditer(text))
    if thoughts and not thoughts[-1][1]:  # truncated while still thinking
        return ""
    return text[thoughts[-1].end() :] if thoughts else text


def final_number(text: str) -> Number | None:
    """Return the final number of a response, exactly.

    A marked answer must be one number; only words, a unit and punctuation may surround it. The
    first clause with digits counts, so listing several candidates does not help. Supported are
    signs, thousands separators, decimals, exponents, powers, fractions, mixed numbers, currency and
    percent.

    Returns:
        The number, or None if there is none (also after a marker without a number).
    """
    text = spoken(text)
    text = _DISPLAY.sub(" ", _TAG.sub(" ", text))
    # Prefer the last marked answer; without a marker read the last line.
    markers = list(_MARKER.finditer(text))
    # Without a marker, the last line with digits must state one number, or end with one.
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
    # "The answer is this:", followed by the number alone at the end.
    return None if last.group() == "####" else read_number(_last_line(rest))


def _last_line(text: str) -> str:
    """Return the last line with digits, or ""."""
    return next((line for line in reversed(text.splitlines()) if holds_digits(line)), "")


def _same_number(answer: Number, reference: Number) -> bool:
    """Return whether two numbers are equal.

    If only one has a percent sign, both readings are accepted: 50% matches 50 and 0.5.
    """
    if answer.value == reference.value:
        return True
    if answer.is_percent == reference.is_percent:
        return False
    scaled = [n.value / 100 if n.is_percent else n.value for n in (answer, reference)]
    return scaled[0] == scaled[1]


def reference_number(value: object) -> Number:
    """Return the single number of a reference; a worked solution ends with a marker.

    Raises:
        InvalidScoreError: the reference is not a number, has several, or is an expression.
    """
    text = str(value)
    found = final_number(text) if _MARKER.search(text) else read_number(text)
    if found is not None and not isinstance(value, dict) and not _MORE.search(text):
        return found
    if not holds_digits(text) and text.replace(" ", "").isalpha():
        raise InvalidScoreError("reference contains no number")
    raise InvalidScoreError("reference is not one number; use latex: true")


def _number_score(answer: str, value: object) -> float:
    reference = reference_number(value)
    found = final_number(answer)
    return float(found is not None and _same_number(found, reference))


@dataclass(frozen=True, slots=True)
class Expressions:
    """Compares expressions; an equal number in any notation needs no verifier."""

    verifier: LatexVerifier

    def score(self, answer: str, value: object) -> float:
        """Return 1.0 if the response's final expression equals the reference, else 0.0.

        Raises:
            InvalidScoreError: the reference cannot be read, or the verifier failed.
        """
        try:
            reference = reference_number(value)
        except InvalidScoreError:
            return self.verifier.score(spoken(answer), value)
        # Several marked answers are left to the verifier, which compares them all.
        found = final_number(answer) if len(_MARKER.findall(answer)) < 2 else None
        if found is not None and _same_number(found, reference):
            return 1.0
        try:
            return self.verifier.score(spoken(answer), value)
        except UnreadableReferenceError:
            return 0.0


def build_math(spec: MathSpec) -> Rule:
    """Build the reward that compares the final number or, with ``latex``, the final expression.

    Args:
        spec: ``column`` of the reference, ``latex``, ``timeout_s`` (seconds per response).

    Raises:
        ValueError: ``latex`` is set but math-verify is not installed.
    """
    function = _number_score
    if spec.latex:
        function = Expressions(LatexVerifier(timeout_s=spec.timeout_s)).score
    return rule_from_spec(spec, function, column=spec.column)
