"""Rule-based rewards on the response's text: match, regex, format, length, repetition."""

import unicodedata
from collections.abc import Callable
from typing import Any

import regex

from reward_models.base import InvalidScoreError, Rule, rule_from_spec
from reward_models.specs import (
    ExactMatchSpec,
    FormatSpec,
    LengthSpec,
    RegexSpec,
    RepetitionSpec,
)

PatternSpec = ExactMatchSpec | RegexSpec | FormatSpec

PATTERN_TIMEOUT_S = 1.0
"""Time limit of one pattern on one response, since patterns can take exponential time."""


def _compile(spec: PatternSpec, *, num_groups: int | None = None) -> regex.Pattern[str]:
    """Compile the pattern of a spec; the grammar is that of ``re`` (``regex`` version 0).

    Raises:
        ValueError: the pattern is malformed or does not have the required number of groups.
    """
    where = f"reward '{spec.label}': pattern {spec.pattern!r}"
    try:
        pattern = regex.compile(_composed(spec.pattern or ""))
    except regex.error as error:
        raise ValueError(f"{where} is not a regular expression: {error}") from error
    if num_groups is not None and pattern.groups != num_groups:
        raise ValueError(
            f"{where} has {pattern.groups} groups; it needs exactly {num_groups} around the text "
            "to compare. Use (?:...) for the others."
        )
    return pattern


def _composed(text: str) -> str:
    """Return a text in Unicode's composed form (NFC), so that one letter has one spelling."""
    return unicodedata.normalize("NFC", text)


def _plain_value(value: object) -> str:
    """Return a column's value as text; in a column with gaps, integers are stored as floats."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _within_limit(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except TimeoutError:
        raise InvalidScoreError("pattern timed out") from None


def exact_match(spec: ExactMatchSpec) -> Rule:
    """Score 1 if the response, or what ``pattern`` captures of it, equals the column's value.

    Surrounding white space and Unicode composition are ignored; 4.0 in a column with gaps is 4. The
    last match of the pattern counts, so a response that corrects itself is scored by its end. No
    match is a wrong answer: 0. A list in the column contains several accepted values.
    """
    pattern: Any = _compile(spec, num_groups=1) if spec.pattern is not None else None

    def clean(text: object) -> str:
        stripped = _composed(_plain_value(text)).strip()
        return _composed(stripped.casefold()) if spec.ignore_case else stripped

    def score(answer: str, value: object) -> float:
        if pattern is not None:
            found = _within_limit(
                lambda: pattern.findall(_composed(answer), timeout=PATTERN_TIMEOUT_S)
            )
            if not found:
                return 0.0
            # The last one: a response may name candidates before it decides.
            answer = found[-1]
        accepted = value if isinstance(value, list | tuple) else [value]
        return float(clean(answer) in {clean(v) for v in accepted})

    return rule_from_spec(spec, score, column=spec.column)


def regex_found(spec: RegexSpec) -> Rule:
    """Score 1 if the pattern is found anywhere in the response."""
    pattern = _compile(spec)

    def score(answer: str, value: object) -> float:
        found = _within_limit(lambda: pattern.search(_composed(answer), timeout=PATTERN_TIMEOUT_S))
        return float(found is not None)

    return rule_from_spec(spec, score)


def format_matches(spec: FormatSpec) -> Rule:
    """Score 1 if the whole response matches the pattern."""
    pattern = _compile(spec)

    def score(answer: str, value: object) -> float:
        found = _within_limit(
            lambda: pattern.fullmatch(_composed(answer), timeout=PATTERN_TIMEOUT_S)
        )
        return float(found is not None)

    return rule_from_spec(spec, score)


def length(spec: LengthSpec) -> Rule:
    """Score 1 up to ``target`` words, 0 from ``limit`` words on, linear in between.

    Raises:
        ValueError: ``limit`` is not above ``target``.
    """
    target, limit = spec.target, spec.limit
    if limit <= target:
        raise ValueError(
            f"reward '{spec.label}': limit {limit} must be above target {target} (both in words)"
        )

    def score(answer: str, value: object) -> float:
        num_words = len(answer.split())
        return min(1.0, max(0.0, (limit - num_words) / (limit - target)))

    return rule_from_spec(spec, score)


def repetition(spec: RepetitionSpec) -> Rule:
    """Score the fraction of the response's word n-grams that are distinct.

    A response with fewer than ``ngram`` words repeats nothing and scores 1.
    """
    ngram = spec.ngram

    def score(answer: str, value: object) -> float:
        words = answer.split()
        grams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0

    return rule_from_spec(spec, score)
