"""Compare texts by their words: word n-grams, Jaccard similarity, a cheap sketch."""

from zlib import crc32

SHINGLE = 3
"""Words of one shingle."""
MIN_SHINGLES = 12
"""Texts with fewer are too short to be called nearly the same."""

_64_BITS = 2**64 - 1
_MARKS = bytes(set(range(33, 128)) - set(b"0123456789abcdefghijklmnopqrstuvwxyz"))


def words(text: str) -> list[int]:
    """Give the hash of every word; case and ASCII punctuation do not count."""
    return list(map(crc32, text.lower().encode("utf-8", "replace").translate(None, _MARKS).split()))


def grams(hashes: list[int], size: int) -> set[int]:
    """Give the hash of every run of ``size`` words; the same in every process."""
    return set(map(hash, zip(*(hashes[i:] for i in range(size)), strict=False)))


def sketch(hashes: list[int]) -> tuple[int, int]:
    """Give the smallest and the largest shingle hash, or zeros for a text that is too short.

    Each is the same for two texts with a probability of their Jaccard similarity J, so a pair
    that agrees in one of them is found with a probability of about 1 - (1 - J)^2: 0.99 at 0.9.
    """
    if len(hashes) < MIN_SHINGLES + SHINGLE - 1:
        return 0, 0
    shingles = list(map(hash, zip(hashes, hashes[1:], hashes[2:], strict=False)))
    return min(shingles) & _64_BITS, max(shingles) & _64_BITS


def similarity(a: set[int], b: set[int]) -> float:
    """Give the Jaccard similarity of two sets, from 0 to 1."""
    return len(a & b) / len(a | b) if a or b else 0.0
