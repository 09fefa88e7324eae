"""Text similarity: ROUGE-L for short texts, near duplicates and TF-IDF distance for many."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.data.text.ngrams import minhash, shingles, similarity, word_texts

NUM_HASHES = 128
PROPOSE = 0.7
"""Fraction of the threshold at which the hashes propose a pair."""
NUM_FEATURES = 4096


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """Return the F-measure of the longest common subsequence of two lists of words, in [0, 1].

    Reference: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1,
    with beta = 1.
    """
    from rapidfuzz.distance import LCSseq

    return 2.0 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a and b else 0.0


def nearest(text: Sequence[str], pool: Sequence[Sequence[str]]) -> tuple[int, float]:
    """Return the index and value of the highest ROUGE-L in ``pool``; (-1, 0.0) if it is empty."""
    best, value = -1, 0.0
    for i, other in enumerate(pool):
        # The lengths bound the common subsequence, so most members can be skipped.
        if 2.0 * min(len(text), len(other)) > value * (len(text) + len(other)):
            found = rouge_l(text, other)
            if found > value:
                best, value = i, found
    return best, value


def near_duplicates(
    texts: Sequence[str],
    *,
    threshold: float,
    comparable: Callable[[int, int], bool] = lambda later, earlier: True,
) -> Iterator[tuple[int, int, float]]:
    """Yield texts that repeat an earlier one almost word for word.

    MinHash with locality-sensitive hashing proposes pairs by their word triples. Each pair is then
    measured exactly, so that nothing below the threshold is reported.

    Args:
        texts: any number of texts.
        threshold: Jaccard similarity in (0, 1].
        comparable: tells for two texts, by their positions, whether they may count as a pair.

    Yields:
        (later text, the earlier one that is kept, similarity). A reported text is never the earlier
        one of another pair.
    """
    from datasketch import MinHashLSH

    # An index for the threshold itself would miss a third of the pairs just above it.
    index = MinHashLSH(threshold=PROPOSE * threshold, num_perm=NUM_HASHES)
    triples = [shingles(text) for text in texts]
    for i, own in enumerate(triples):
        sketch = minhash(own, permutations=NUM_HASHES)
        others: list[Any] = index.query(sketch)
        found = [(similarity(own, triples[j]), -j) for j in others if comparable(i, j)]
        value, other = max(found, default=(0.0, 0))
        if found and value >= threshold:
            yield i, -other, value
        else:
            index.insert(i, sketch)


def tfidf(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return unit TF-IDF vectors: (texts, features), with hashed features if there are many.

    Term frequency is 1 + log(count), inverse document frequency log(N / df) + 1.
    """
    counts = [Counter(word_texts(text)) for text in texts]
    df = Counter(word for found in counts for word in found)
    place = {word: i % NUM_FEATURES for i, word in enumerate(sorted(df, key=lambda w: (-df[w], w)))}
    out = np.zeros((len(texts), min(max(len(place), 1), NUM_FEATURES)), np.float32)
    for row, found in zip(out, counts, strict=True):
        for word, count in found.items():
            weight = (1.0 + math.log(count)) * (math.log(len(texts) / df[word]) + 1.0)
            row[place[word]] += weight
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    return (out / np.where(norms > 0.0, norms, 1.0)).astype(np.float32, copy=False)


def diverse(
    vectors: NDArray[np.float32], order: Sequence[int], *, rows: int, min_distance: float
) -> tuple[list[int], dict[int, float]]:
    """Select rows in order, skipping those too close to a row that was already selected.

    Args:
        vectors: unit vectors.
        order: indices, the best first.
        rows: largest number of rows to select.
        min_distance: rows with a smaller 1 - cosine similarity are skipped.

    Returns:
        The selected indices and, for the skipped ones, the distance to the nearest selected row.
    """
    taken: list[int] = []
    passed: dict[int, float] = {}
    held = np.empty((min(rows, len(order)), vectors.shape[1]), np.float32)
    for i in order:
        if len(taken) == rows:
            break
        distance = 1.0 - float((held[: len(taken)] @ vectors[i]).max()) if taken else 1.0
        if distance < min_distance:
            passed[i] = distance
            continue
        held[len(taken)] = vectors[i]
        taken.append(i)
    return taken, passed
