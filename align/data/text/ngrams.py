"""Define words and compare texts by them: n-grams, Jaccard similarity, sketches.

These rules are shared by the data check, the contamination check and the data-creating stages.
"""

from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE = 3
"""Number of words in a shingle."""
MIN_SHINGLES = 12
"""Texts with fewer shingles are too short to be near duplicates."""

_64_BITS = 2**64 - 1
_MARKS = bytes(set(range(33, 128)) - set(b"0123456789abcdefghijklmnopqrstuvwxyz"))


def _split(text: str) -> list[bytes]:
    return text.lower().encode("utf-8", "replace").translate(None, _MARKS).split()


def words(text: str) -> list[int]:
    """Return the hash of every word, ignoring case and ASCII punctuation."""
    return list(map(crc32, _split(text)))


def word_texts(text: str) -> list[str]:
    """Return the words that ``words`` hashes."""
    return [word.decode("utf-8") for word in _split(text)]


def grams(hashes: list[int], size: int) -> set[int]:
    """Return the hash of every run of ``size`` words, the same in every process."""
    return set(map(hash, zip(*(hashes[i:] for i in range(size)), strict=False)))


def shingles(text: str) -> set[int]:
    """Return the hashes of a text's word triples; a shorter text is one gram of all its words."""
    hashes = words(text)
    return grams(hashes, min(SHINGLE, len(hashes)))


def minhash(hashes: set[int], *, permutations: int) -> "MinHash":
    """Return the MinHash of a set of shingle hashes, for an index that proposes similar sets."""
    from datasketch import MinHash  # imports scipy, so import it only when needed

    found = MinHash(num_perm=permutations, hashfunc=_folded)
    found.update_batch(sorted(hashes))
    return found


def _folded(value: int) -> int:
    return value & 0xFFFFFFFF


def sketch(hashes: list[int]) -> tuple[int, int]:
    """Return the smallest and the largest shingle hash, or zeros if the text is too short.

    Each is equal for two texts with a probability of their Jaccard similarity J. A pair is found if
    either one is equal, with a probability of about 1 - (1 - J)^2: 0.99 at J = 0.9.
    """
    if len(hashes) < MIN_SHINGLES + SHINGLE - 1:
        return 0, 0
    shingles = list(map(hash, zip(hashes, hashes[1:], hashes[2:], strict=False)))
    return min(shingles) & _64_BITS, max(shingles) & _64_BITS


def similarity(a: set[int], b: set[int]) -> float:
    """Return the Jaccard similarity of two sets, from 0 to 1."""
    return len(a & b) / len(a | b) if a or b else 0.0
