"""What a word is, and how alike texts are by their words: n-grams, Jaccard similarity, sketches.

One home of these rules: the data check, the contamination check and the stages that make data.
"""

from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE = 3
"""Words of one shingle."""
MIN_SHINGLES = 12
"""Texts with fewer are too short to be called nearly the same."""

_64_BITS = 2**64 - 1
_MARKS = bytes(set(range(33, 128)) - set(b"0123456789abcdefghijklmnopqrstuvwxyz"))


def _split(text: str) -> list[bytes]:
    return text.lower().encode("utf-8", "replace").translate(None, _MARKS).split()


def words(text: str) -> list[int]:
    """Give the hash of every word; case and ASCII punctuation do not count."""
    return list(map(crc32, _split(text)))


def word_texts(text: str) -> list[str]:
    """Give the words that ``words`` hashes."""
    return [word.decode("utf-8") for word in _split(text)]


def grams(hashes: list[int], size: int) -> set[int]:
    """Give the hash of every run of ``size`` words; the same in every process."""
    return set(map(hash, zip(*(hashes[i:] for i in range(size)), strict=False)))


def shingles(text: str) -> set[int]:
    """Give the hashes of a text's word triples; a shorter text is one gram of all its words."""
    hashes = words(text)
    return grams(hashes, min(SHINGLE, len(hashes)))


def minhash(hashes: set[int], *, permutations: int) -> "MinHash":
    """Give the MinHash of a set of shingle hashes, for an index that proposes similar sets."""
    from datasketch import MinHash  # imports scipy: only where it is needed

    found = MinHash(num_perm=permutations, hashfunc=_folded)
    found.update_batch(sorted(hashes))
    return found


def _folded(value: int) -> int:
    return value & 0xFFFFFFFF


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
