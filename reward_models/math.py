"""Reward for mathematics: the final number, or LaTeX expression, of an answer is the right one.

The final answer is what follows the last of ``####``, ``\\boxed{...}`` and "answer is"; without
such a marker it is the last number of the text.
"""

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from reward_models.base import InvalidScoreError, Rule, rule_from_spec
from reward_models.math_process import LatexVerifier
from reward_models.specs import MathSpec

MAX_DIGITS = 400
"""Longest number, in characters, that is read; longer ones are no answer to any exercise."""

_NUMBER = re.compile(
    r"""
    (?<![\w./])                                 # not inside a word or another number
    (?P<sign>[-+\u2212]?)                       # a minus before a digit, not after one: 10-5
    [\\]?[$\u20ac\u00a3]?
    (?P<sign_after_currency>-?)
    (?:(?P<whole>\d+)[ ](?=\d+[ ]?/[ ]?\d))?    # the 1 of the mixed number 1 1/2
    (?P<main>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
    (?P<exponent>[eE][-+]?\d{1,2}(?![\w.]))?
    (?:[ ]?/[ ]?(?P<denominator>\d+(?:\.\d+)?))?
    (?!\d)
    (?!(?:st|nd|rd|th)\b)                       # an ordinal is not a quantity
    (?P<percent>[ ]?[\\]?%)?
    """,
    re.VERBOSE,
)
_MARKER = re.compile(r"####|\\boxed\s*\{|\banswer\s*(?:is\b|:|=)", re.IGNORECASE)
_LATEX_FRACTION = re.compile(r"(-?)\\[dt]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*(-?[\d.]+)\s*\}")
_LATEX_COMMA = re.compile(r"\{,\}|,\\!")
_DECORATION = re.compile(r"\*\*|\\[,;!]|\\(?:text|mathrm|mathbf)\b|[{}]")


@dataclass(frozen=True, slots=True)
class Number:
    """Hold an exact number and whether a percent sign followed it."""

    value: Fraction
    is_percent: bool = False


def _braced(text: str, start: int) -> str:
    """Give what stands between the brace opened just before ``start`` and its partner."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return text[start:]


def _marked_answer(text: str) -> str | None:
    """Give what follows the last marker: the braces' content or the sentence, within the line."""
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    last = markers[-1]
    if last.group().endswith("{"):
        return _braced(text, last.end())
    line = text[last.end() :].lstrip().split("\n", 1)[0]
    sentences = re.split(r"[.!?;](?:\s+|$)", line)
    return next((s for s in sentences if any(c.isdigit() for c in s)), "")


def _plain_fractions(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        sign, top, bottom = match.groups()
        minuses = [sign, top[:1], bottom[:1]].count("-")
        return f" {'-' if minuses % 2 else ''}{top.lstrip('-')}/{bottom.lstrip('-')} "

    text = _LATEX_COMMA.sub(",", text)
    return _DECORATION.sub(" ", _LATEX_FRACTION.sub(plain, text))


def _number(match: re.Match[str]) -> Number | None:
    if len(match.group()) > MAX_DIGITS:
        return None
    mantissa = match["main"].replace(",", "")
    try:
        value = Fraction(Decimal(mantissa + (match["exponent"] or "")))
        if match["denominator"] is not None:
            value /= Fraction(Decimal(match["denominator"]))
        if match["whole"] is not None:
            value += int(match["whole"])
    except (ZeroDivisionError, InvalidOperation):
        return None
    is_negative = match["sign"] in ("-", "\u2212") or match["sign_after_currency"] == "-"
    return Number(-value if is_negative else value, match["percent"] is not None)


def _numbers(text: str) -> list[Number | None]:
    return [_number(match) for match in _NUMBER.finditer(_plain_fractions(text))]


def final_number(text: str) -> Number | None:
    """Read the final number of an answer, exactly.

    After a marker the first number counts (the one after the last ``=`` where there is an
    equation), so listing several candidates gains nothing; without a marker the last of the text.
    Read are signs, thousands commas, decimals, exponents, fractions, mixed numbers, currency and
    percent signs.

    Returns:
        The number, or None where there is none (a marker without a number has none).
    """
    marked = _marked_answer(text)
    if marked is None:
        found = _numbers(text)
        return found[-1] if found else None
    found = _numbers(marked.rsplit("=", 1)[-1])
    return found[0] if found else None


def same_number(answer: Number, reference: Number) -> bool:
    """Tell whether two numbers are equal.

    Where only one has a percent sign, both readings count: 50% answers 50 and 0.5.
    """
    if answer.value == reference.value:
        return True
    if answer.is_percent == reference.is_percent:
        return False
    scaled = [n.value / 100 if n.is_percent else n.value for n in (answer, reference)]
    return scaled[0] == scaled[1]


def _number_score(answer: str, value: Any) -> float:
    reference = final_number(str(value))
    if reference is None:
        raise InvalidScoreError("reference holds no number")
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
