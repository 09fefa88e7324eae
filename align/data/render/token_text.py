"""A text that is tokenized once, with a mapping from characters to tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows have in common before the first that differs."""
    pairs = zip(one, other, strict=False)
    differs = (i for i, (a, b) in enumerate(pairs) if a != b)
    return next(differs, min(len(one), len(other)))


class TokenText:
    """The token ids of a whole text, as ``apply_chat_template(tokenize=True)`` returns them.

    A text must not be tokenized in pieces: SentencePiece tokenizers put a space before each piece,
    and others merge characters across the boundary.

    Args:
        tokenizer: any tokenizer; without character offsets, prefixes are tokenized instead.
        text: the whole text, without the special tokens that the tokenizer would add.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        is_fast = bool(tokenizer.is_fast)
        found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=is_fast)
        self.ids: list[int] = list(found["input_ids"])
        self._spans: Sequence[tuple[int, int]] | None = found["offset_mapping"] if is_fast else None

    def before(self, cut: int) -> int:
        """Return the number of tokens before character ``cut``.

        A token that spans the cut is not counted, because the prompt alone would not contain it.
        """
        if self._spans is None:
            return self._shared_with_prefix(cut)
        first = next((i for i, (_, end) in enumerate(self._spans) if end > cut), len(self.ids))
        start = first
        while start and self._spans[start - 1] == (cut, cut):
            start -= 1
        if start == first:
            return first
        # Tokens without width end at the cut: white space whose offsets were trimmed, or a space
        # that the tokenizer inserted. Only tokenizing the prefix shows on which side they belong.
        return min(first, max(start, self._shared_with_prefix(cut)))

    def end_of(self, index: int) -> int:
        """Return the character at which token ``index`` ends; the end of the text if unknown."""
        return len(self._text) if self._spans is None else self._spans[index][1]

    def _shared_with_prefix(self, cut: int) -> int:
        prefix: Any = self._tokenizer(self._text[:cut], add_special_tokens=False)["input_ids"]
        pairs = zip(self.ids, prefix, strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(self.ids))
        )
