"""A text that is tokenized once, with a mapping from characters to tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from align.core.types import Example, TokenRow, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_TOGETHER = 2**18
"""Characters that are tokenized in one call."""


class Written(NamedTuple):
    """A rendered conversation: its turns, how many of them are the prompt, and the whole text.

    ``ends`` has the number of each assistant turn, and the characters between which it is.
    """

    turns: list[Turn]
    num_prompt: int
    text: str
    ends: list[tuple[int, int, int]]


def believed(row: TokenRow, example: Example) -> TokenRow:
    """Return a row with the example's label probability, 1 by default."""
    if row.label_prob == example.label_prob:
        return row
    return replace(row, label_prob=example.label_prob)


def leading_bos(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the BOS that a tokenizer writes before a text; empty if it writes none."""
    bos = tokenizer.bos_token_id
    # Some tokenizers have a BOS but never write it, so ask instead of reading the setting.
    ids = list(tokenizer("a")["input_ids"])
    return [bos] if isinstance(bos, int) and ids[:1] == [bos] else []


def num_head(prompt_ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return 1 if a prompt begins with BOS, whoever wrote it, else 0.

    A template may use the same token for each turn; then it marks a turn, not the beginning.
    """
    bos = tokenizer.bos_token_id
    return int(prompt_ids[:1] == (bos,) and bos not in prompt_ids[1:])


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows have in common before the first that differs."""
    pairs = zip(one, other, strict=False)
    differs = (i for i, (a, b) in enumerate(pairs) if a != b)
    return next(differs, min(len(one), len(other)))


def weighed_row(
    ids: Sequence[int], spans: Sequence[tuple[int, int, float]], source: str
) -> TokenRow:
    """Return a row that trains its spans of tokens: (first, one after the last, weight above 0).

    The spans are in order, and apart from each other.
    """
    masks = [(start, stop, weight > 0.0) for start, stop, weight in spans]
    trained = _spread(len(ids), masks, beside=False)
    # Without fractional weights the mask says everything.
    is_whole = {weight for _, _, weight in spans} <= {0.0, 1.0}
    weights = () if is_whole else _spread(len(ids), spans, beside=0.0)
    return TokenRow(tuple(ids), trained, source, weights=weights)


def _spread(num: int, spans: Sequence[tuple[int, int, T]], beside: T) -> tuple[T, ...]:
    """Return a value for each of ``num`` tokens: that of its span, or ``beside``."""
    found: tuple[T, ...] = ()
    for start, stop, value in spans:
        found += (beside,) * (start - len(found)) + (value,) * (stop - start)
    return found + (beside,) * (num - len(found))


def plain_backend(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Return the fast tokenizer below, if its encodings are what ``tokenizer(text)`` gives.

    None if the tokenizer does more than to call it, or settings of an earlier call are left in it.
    """
    from transformers import PreTrainedTokenizerFast

    kind, fast = type(tokenizer), PreTrainedTokenizerFast
    if not isinstance(tokenizer, fast) or hasattr(kind, "_switch_to_input_mode"):
        return None
    if kind.__call__ is not fast.__call__ or kind._encode_plus is not fast._encode_plus:
        return None
    backend: Any = tokenizer.backend_tokenizer
    is_plain = backend.truncation is None and backend.padding is None
    if not is_plain or backend.encode_special_tokens != tokenizer.split_special_tokens:
        return None
    return backend


def token_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]
) -> Iterator["TokenText"]:
    """Yield the token ids of texts, tokenized several at a time where that changes nothing."""
    backend = plain_backend(tokenizer)
    if backend is None:
        yield from (TokenText(tokenizer, text) for text in texts)
        return
    start = 0
    while start < len(texts):
        # Encodings take much more memory than texts.
        stop, size = start + 1, len(texts[start])
        while stop < len(texts) and (size := size + len(texts[stop])) <= _TOGETHER:
            stop += 1
        found = backend.encode_batch(list(texts[start:stop]), add_special_tokens=False)
        for text, encoding in zip(texts[start:stop], found, strict=True):
            yield TokenText(tokenizer, text, encoding)
        start = stop


class TokenText:
    """The token ids of a whole text, as ``apply_chat_template(tokenize=True)`` returns them.

    A text must not be tokenized in pieces: SentencePiece tokenizers put a space before each piece,
    and others merge characters across the boundary.

    Args:
        tokenizer: any tokenizer; without character offsets, prefixes are tokenized instead.
        text: the whole text, without the special tokens that the tokenizer would add.
        encoding: of the text, by the backend of the tokenizer; None to make it.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", text: str, encoding: Any = None
    ) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._spans: Sequence[tuple[int, int]] | None = None
        if encoding is None and (backend := plain_backend(tokenizer)) is not None:
            encoding = backend.encode(text, add_special_tokens=False)
        self._encoding: Any = encoding
        if encoding is not None:
            # Most rows need two of the offsets; a list of all of them costs a tenth of the time.
            self.ids: list[int] = self._encoding.ids
            return
        is_fast = bool(tokenizer.is_fast)
        found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=is_fast)
        self.ids = list(found["input_ids"])
        self._spans = found["offset_mapping"] if is_fast else None

    def before(self, cut: int) -> int:
        """Return the number of tokens before character ``cut``.

        A token that spans the cut is not counted, because the prompt alone would not contain it.
        """
        if self._spans is None and self._encoding is None:
            return self._shared_with_prefix(cut)
        first = self._first_beyond(cut)
        start = first
        while start and self._span(start - 1) == (cut, cut):
            start -= 1
        if start == first:
            return first
        # Tokens without width end at the cut: white space whose offsets were trimmed, or a space
        # that the tokenizer inserted. Only tokenizing the prefix shows on which side they belong.
        return min(first, max(start, self._shared_with_prefix(cut)))

    def end_of(self, index: int) -> int:
        """Return the character at which token ``index`` ends; the end of the text if unknown."""
        known = self._spans is not None or self._encoding is not None
        return self._span(index)[1] if known else len(self._text)

    def _span(self, index: int) -> tuple[int, int]:
        """Return the characters of a token: the first, and the one after the last."""
        if self._spans is None:
            return self._encoding.token_to_chars(index)
        return self._spans[index]

    def _first_beyond(self, cut: int) -> int:
        """Return the first token that ends after character ``cut``, or the number of tokens."""
        if cut >= len(self._text):
            return len(self.ids)
        spans = self._spans
        if spans is None:
            found = self._encoding.char_to_token(cut)
            if found is not None:
                # A space of width 0 that the tokenizer inserted may begin after this character.
                while found and self._span(found - 1)[1] > cut:
                    found -= 1
                return found
            # None contains it: white space that offsets leave out.
            spans = self._spans = self._encoding.offsets
        return next((i for i, (_, end) in enumerate(spans) if end > cut), len(self.ids))

    def _shared_with_prefix(self, cut: int) -> int:
        prefix: Any = self._tokenizer(self._text[:cut], add_special_tokens=False)["input_ids"]
        pairs = zip(self.ids, prefix, strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(self.ids))
        )
