"""Similarity of two texts, each measure between 0 and 1, on lower-case words.

The definitions are those of the papers; what they leave open is said beside each function. METEOR
has exact words only: its stems and synonyms need word lists that are not part of this package.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from rapidfuzz import fuzz

WORD = re.compile(r"\w+")
ORDERS = 4
"""Longest n-grams of BLEU and GLEU."""
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA = 0.9, 3.0, 0.5


def similarity(metric: str, text: str, reference: str) -> float:
    """Return the similarity of a text to its reference.

    Args:
        metric: one of ``METRICS``.
        text: of the model.
        reference: expected text.
    """
    if metric == "fuzzy_match":
        return fuzz.ratio(text.lower(), reference.lower()) / 100
    found, expected = WORD.findall(text.lower()), WORD.findall(reference.lower())
    if not found or not expected:
        return float(found == expected)
    if metric.startswith("rouge_"):
        order = metric.removeprefix("rouge_")
        return _rouge_l(found, expected) if order == "l" else _rouge_n(found, expected, int(order))
    return {"bleu": _bleu, "gleu": _gleu, "meteor": _meteor}[metric](found, expected)


METRICS = (
    *("fuzzy_match", "bleu", "gleu", "meteor", "rouge_l"),
    *(f"rouge_{n}" for n in range(1, 6)),
)


def _ngrams(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def _bleu(found: Sequence[str], expected: Sequence[str]) -> float:
    """Return BLEU of one sentence (Papineni et al. 2002).

    From the second order on, one is added to both counts (Lin and Och 2004), since a single
    sentence often shares no longer n-gram.
    """
    logs = []
    for order in range(1, ORDERS + 1):
        ours, theirs = _ngrams(found, order), _ngrams(expected, order)
        smooth = 0 if order == 1 else 1
        matches = (ours & theirs).total() + smooth
        total = ours.total() + smooth
        if not matches:
            return 0.0
        logs.append(math.log(matches / total))
    shortness = min(0.0, 1 - len(expected) / len(found))
    return math.exp(shortness + sum(logs) / ORDERS)


def _gleu(found: Sequence[str], expected: Sequence[str]) -> float:
    """Return GLEU (arXiv:1609.08144): the smaller of recall and precision of all 1- to 4-grams."""
    ours, theirs = Counter(), Counter()
    for order in range(1, ORDERS + 1):
        ours += _ngrams(found, order)
        theirs += _ngrams(expected, order)
    return (ours & theirs).total() / max(ours.total(), theirs.total())


def _meteor(found: Sequence[str], expected: Sequence[str]) -> float:
    """Return METEOR (Banerjee and Lavie 2005) of exact words.

    Each word is aligned with the earliest free equal word that continues the chunk, or else with
    the earliest free one.
    """
    free: dict[str, list[int]] = {}
    for i, word in enumerate(expected):
        free.setdefault(word, []).append(i)
    aligned, chunks, last = 0, 0, None
    for word in found:
        places = free.get(word)
        if not places:
            last = None
            continue
        # Continue the chunk where that is possible: fewer chunks are the better alignment.
        place = last + 1 if last is not None and last + 1 in places else places[0]
        places.remove(place)
        chunks += last is None or place != last + 1
        aligned, last = aligned + 1, place
    if not aligned:
        return 0.0
    precision, recall = aligned / len(found), aligned / len(expected)
    mean = precision * recall / (METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall)
    return mean * (1 - METEOR_GAMMA * (chunks / aligned) ** METEOR_BETA)


def _rouge_n(found: Sequence[str], expected: Sequence[str], order: int) -> float:
    """Return the F1 score of ROUGE-N (Lin 2004)."""
    ours, theirs = _ngrams(found, order), _ngrams(expected, order)
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _rouge_l(found: Sequence[str], expected: Sequence[str]) -> float:
    """Return the F1 score of ROUGE-L, by the longest common subsequence (Lin 2004)."""
    row = [0] * (len(expected) + 1)
    for word in found:
        diagonal = 0
        for i, other in enumerate(expected, start=1):
            diagonal, row[i] = row[i], diagonal + 1 if word == other else max(row[i], row[i - 1])
    return _f1(row[-1], len(found), len(expected))


def _f1(matches: int, ours: int, theirs: int) -> float:
    return 2 * matches / (ours + theirs) if matches else 0.0
