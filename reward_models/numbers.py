"""Read exactly one number from a text, or none if anything else would change its value.

A text is split into numbers, words, punctuation and everything else (operators, variables, LaTeX
commands). It is read as a number if it contains exactly one, and otherwise only words, units and
punctuation: ``2\\pi``, ``3x+1``, ``5 - 3`` and ``(3, 4)`` are not numbers.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

MAX_DIGITS = 400
"""Longest number that is read, in characters; no exercise has longer ones."""
MAX_POWER = 400
"""Largest absolute exponent that is computed."""
MAX_STATEMENT = 1000
"""Longest text that is read as one number, in characters."""

_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
_SIGNS = {0x22C5: "×", 0xB7: "×", 0x2219: "×", 0x2044: "/", 0xB0: " degrees ", 0xBA: " degrees "}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_UNIT_NAMES = (
    "m g s h l A V W J N L C F km cm mm nm kg mg lb lbs oz ft in yd mi mph kph kmh ml dl cl hr hrs "
    "min mins sec secs ms am pm px usd eur gbp gb mb kb tb hz khz mhz ghz kw kwh wh mol pa kpa bar "
    "atm rad deg sq cu ha kcal cal"
)
"""Units that may directly follow their number; any longer word may too."""
_UNITS = frozenset(_UNIT_NAMES.split())
_PER = r"\s{0,2}/\s?(?=[^\W\d_]{3}|(?:" + "|".join(sorted(_UNITS)) + r")(?![^\W_]))"
"""A slash before a unit of three letters or a known one: 18/hour, 60 km/h; 3/x is a quotient."""
_LATEX = (
    # A command ends at the first character that is not a letter: \times10 is \times and 10.
    (r"\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
    (r"\\!|\\(?:left|right|displaystyle|textstyle)(?![A-Za-z])|\\[()\[\]]|\$\$", ""),
    (r"\{,\}", ","),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox|textit|operatorname)\s*\{([^{}]*)\}", None),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", " degrees "),
    (r"\\(?:times|cdot)(?![A-Za-z])", "×"),
    (r"\\(?:approx|simeq|equiv|to)(?![A-Za-z])|[≈→]", "="),
    (r"\\([$%#&])", r"\1"),
    (r"[<>!]=|(?<=\w)\s?>", "≠"),
    (r"\^\s*\{\s*(-?\d+)\s*\}", r"^\1"),
    (r"(?<=\d)\*\*(?=\d)", "^"),
    # Markdown emphasis: stars adjacent to the text they enclose.
    (r"(?<![\w*])\*{1,3}(?=\S)|(?<=\S)\*{1,3}(?![\w*])|`", ""),
    (r"(?<!\\)[{}]", " "),
    (r"\b(?:minus|negative)\s+(?=[$€£¥]?[\d.])", "-"),
    (r"(^|[=(:])\s*([-+])\s+(?=[\d.$€£¥])", r"\1 \2"),
    (r"([-+])\s?[$€£¥₹](?=[\d.])", r"\1"),
    (r"[$€£¥₹¢]", " "),
    (r"(?i)(?<=\d)\s?(?:percent|per cent)\b", "%"),
    (r"(?<=[\d%])" + _PER, " per "),
    (r"(?<=\w)-(?=[^\W\d_]{2})", " "),  # 5-year-old
)
_LETTER = re.compile(r"(?<![^\W_])[^\W\d_](?![^\W_])")
_CLEANING = tuple((re.compile(pattern), new) for pattern, new in _LATEX)
_FRACTION = re.compile(
    r"(-?)\s*\\[dtc]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))"
)
_TOKEN = re.compile(
    r"""
    (?P<number>
      (?P<sign>(?<![\w.)\]%])[-+])?
      (?<![\w.])
      (?:(?P<whole>\d+)[ ](?=\d+[ ]?/[ ]?\d))?          # the 1 of the mixed number 1 1/2
      (?P<main>
        \d{1,3}(?:(?P<sep>[ ,'_])\d{3}(?:(?P=sep)\d{3})*)(?!\d)(?:\.\d+)?
        | \d{1,2}(?:,\d\d)+,\d{3}(?!\d)(?:\.\d+)?       # lakh and crore
        | \d+(?:\.\d+)? | \.\d+
      )
      (?P<exponent>[eE][-+]?\d{1,3}(?![\w.]))?
      (?:\^(?P<power>-?\d{1,4})(?![\d.^]) | [ ]?/[ ]?(?P<denominator>\d+(?:\.\d+)?)(?![\d^]))?
      (?:[ ]?[×*x][ ]?10\^(?P<ten>[-+]?\d{1,4})(?![\d.^]))?
      (?!\d|(?:st|nd|rd|th)\b)                          # an ordinal is not a quantity
      (?P<percent>[ ]?%)?
    )
    | (?P<word>\d+(?:st|nd|rd|th)\b
        | [^\W\d_][^\W_]*(?:['’][^\W\d_]+)*(?:/[^\W\d_]+)*(?:\^-?[23])?)
    | (?P<punct>[.,;:!?"'()=#—…“”‘’\[\]>]+)
    | (?P<other>\\[A-Za-z]+|\S)
    """,
    re.VERBOSE,
)
_CHANGING_WORDS = (
    "plus minus times over squared cubed power root sqrt pi half halves not sin cos tan cot sec "
    "csc log ln exp mod theta alpha beta infinity"
)
"""Words that change the value of the number beside them."""
_CHANGING = frozenset(_CHANGING_WORDS.split())
_MULTIPLES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_COEFFICIENT = re.compile(r"\d\s?[a-z]\b|(?<![\w\\])[a-z]\s*[-+×*/^]")
"""Matches the left side of an equation if it is an expression in a variable, as in 2x = 6."""

Kind = Literal["number", "word", "punct", "other"]


@dataclass(frozen=True, slots=True)
class Number:
    """An exact number, and whether a percent sign followed it."""

    value: Fraction
    is_percent: bool = False


@dataclass(frozen=True, slots=True)
class _Token:
    kind: Kind
    text: str
    value: Number | None = None


def read_number(text: str, *, is_latex: bool = False) -> Number | None:
    """Return the number that a text states; None if it states none, several, or something else.

    In a chain of equations, the last side counts.

    Args:
        text: one statement, such as ``x = 1,234.5 kg`` or ``\\frac12``.
        is_latex: bare letters are variables, not units, as within ``\\boxed{}``.
    """
    if len(text) > MAX_STATEMENT:
        return None
    sides = clean(text).replace("==", "=").split("=")
    if len(sides) > 1 and _COEFFICIENT.search(sides[0]):
        return None
    tokens = _tokens(sides[-1], is_latex=is_latex)
    numbers = [token for token in tokens if token.kind == "number"]
    if len(numbers) != 1 or any(token.kind == "other" for token in tokens):
        return None
    return numbers[0].value


def last_number(text: str) -> Number | None:
    """Return the last number of prose; None if it is part of an expression or a list."""
    if len(text) > MAX_STATEMENT:
        text = text[-MAX_STATEMENT:].partition(" ")[2]
    tokens = _tokens(clean(text), is_latex=False)
    places = [i for i, token in enumerate(tokens) if token.kind == "number"]
    if not places:
        return None
    at = places[-1]
    # A comma, colon or bracket may separate the number from the token before it.
    before = tokens[max(0, at - 2) : at][::-1]
    if before and before[0].kind == "punct" and before[0].text in (",", ":", "(", "[", ",("):
        joined = [token.kind for token in before[1:]]
    else:
        joined = [token.kind for token in before[:1]]
    after = [token.kind for token in tokens[at + 1 : at + 2]]
    if "other" in joined + after or "number" in joined:
        return None
    return tokens[at].value


def holds_digits(text: str) -> bool:
    """Return whether a text contains any digit."""
    return any(c.isdigit() or unicodedata.category(c) == "No" for c in text)


def clean(text: str) -> str:
    """Return a text with uniform dashes, spaces, fractions, powers and LaTeX commands."""
    text = _VULGAR.sub(lambda m: f" {unicodedata.normalize('NFKC', m.group())} ", text)
    text = text.translate(_DASHES | _SIGNS)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^" + m.group().translate(_SUPERSCRIPTS), text)
    text = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text)
    text = _FRACTION.sub(_plain_fraction, text)
    for pattern, new in _CLEANING:
        text = pattern.sub(_words_of if new is None else new, text)
    return re.sub(r"[ \t]+", " ", text).strip()


def _plain_fraction(match: re.Match[str]) -> str:
    sign, top, bottom = match[1], match[2] or match[3], match[4] or match[5]
    minuses = [sign, top[:1], bottom[:1]].count("-")
    return f" {'-' if minuses % 2 else ''}{top.lstrip('-')}/{bottom.lstrip('-')} "


def _words_of(match: re.Match[str]) -> str:
    """Return the words within ``\\text{...}``; a single letter there, as in km/h, is a unit."""
    return " " + _LETTER.sub("units", match[1])


def _tokens(text: str, *, is_latex: bool) -> list[_Token]:
    found: list[_Token] = []
    for match in _TOKEN.finditer(text):
        if match["number"] is not None:
            found.append(_Token("number", match["number"], _value(match)))
        elif match["word"] is not None:
            word = match["word"]
            touches = match.start() > 0 and text[match.start() - 1].isdigit()
            multiple = _MULTIPLES.get(word.lower())
            if multiple and found and (before := found[-1].value) is not None:
                scaled = Number(before.value * 10**multiple, before.is_percent)
                found[-1] = _Token("number", found[-1].text, scaled)
            else:
                plain = _is_plain(word, touches=touches, is_latex=is_latex)
                found.append(_Token("word" if plain else "other", word))
        else:
            # Within LaTeX, an exclamation mark is a factorial.
            kind: Kind = (
                "punct" if match["punct"] and not (is_latex and "!" in match[0]) else "other"
            )
            found.append(_Token(kind, match.group()))
    return found


def _is_plain(word: str, *, touches: bool, is_latex: bool) -> bool:
    """Return whether a word does not change the value of the number beside it."""
    if word[0].isdigit():  # an ordinal
        return True
    for part in re.sub(r"\^?-?[23]$", "", word).split("/"):
        letters = "".join(c for c in part if c.isalpha())
        is_unit = letters in _UNITS or (len(letters) > 1 and letters.lower() in _UNITS)
        if letters.lower() in _CHANGING and not is_unit:
            return False
        if is_unit and not (is_latex and len(letters) == 1):
            continue
        shortest = 4 if touches else 3 if is_latex else 2
        is_article = letters in ("a", "I") and not touches and not is_latex
        if len(letters) < shortest and not is_article:
            return False
    return "^" not in word or word.split("^")[0].split("/")[-1] in _UNITS | {"units"}


def _value(match: re.Match[str]) -> Number | None:
    if len(match.group()) > MAX_DIGITS:
        return None
    mantissa = re.sub(r"[ ,'_]", "", match["main"])
    powers = [int(match[name]) for name in ("power", "ten") if match[name] is not None]
    if any(abs(power) > MAX_POWER for power in powers):
        return None
    try:
        value = Fraction(Decimal(mantissa + (match["exponent"] or "")))
        if match["power"] is not None:
            value **= int(match["power"])
        if match["denominator"] is not None:
            value /= Fraction(Decimal(match["denominator"]))
        if match["whole"] is not None:
            value += int(match["whole"])
        if match["ten"] is not None:
            value *= Fraction(10) ** int(match["ten"])
    except (ZeroDivisionError, InvalidOperation):
        return None
    return Number(-value if match["sign"] == "-" else value, match["percent"] is not None)
