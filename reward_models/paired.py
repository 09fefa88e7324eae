"""Input of an encoder-based scorer: prompt and response as one pair of texts.

The tokenizer writes the pair in its own format, such as BERT's ``[CLS] prompt [SEP] response
[SEP]``. Training and scoring both take their token ids from `pair_ids`. If the tokenizer
distinguishes the two texts by token types, these follow from the ids: see `separator_of`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reward_models.base import Text, plain_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def pair_ids(
    tokenizer: "PreTrainedTokenizerBase", prompt: Text, completion: Text
) -> tuple[list[int], int]:
    """Tokenize a prompt and its response as a pair, regardless of length.

    The name of a special token in a text stays text, so no response can write a separator.

    Returns:
        The ids, and the number of ids before the response.
    """
    found: Any = tokenizer(
        [plain_text(prompt)], [plain_text(completion)], split_special_tokens=True, verbose=False
    )
    ids, parts = list(found["input_ids"][0]), found.sequence_ids(0)
    return ids, parts.index(1) if 1 in parts else len(ids) - 1


def separator_of(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the token after which the second text of a pair begins, from the token types.

    Returns:
        Its id; None for a tokenizer that uses the same type for both texts.

    Raises:
        ValueError: the types are not 0 up to the first separator and 1 after it.
    """
    found: Any = tokenizer(["a"], ["b"], split_special_tokens=True)
    ids, parts = found["input_ids"][0], found.sequence_ids(0)
    start = parts.index(1)
    # sequence_ids is None at special tokens: one must stand between the two texts.
    if parts[start - 1] is not None:
        raise ValueError(
            "its tokenizer puts no token between the two texts of a pair, so a response cannot "
            "be distinguished from its prompt. Save the tokenizer with a template for pairs."
        )
    types = found.get("token_type_ids", [[0] * len(ids)])[0]
    if not any(types):
        return None
    separator = ids[types.index(1) - 1]
    if types != _types(ids, separator):
        raise ValueError(
            f"its tokenizer gives a pair the token types {types}; expected 0 up to the first "
            "separator and 1 after it, as BERT's does"
        )
    return separator


def token_types(input_ids: "Tensor", separator: int) -> "Tensor":
    """Return the type of each token: 0 up to the first separator of its row, 1 after it."""
    # (B, T): 1 after the first separator, which itself still has type 0.
    ends = (input_ids == separator).long()
    return ((ends.cumsum(-1) - ends) > 0).long()


def _types(ids: Sequence[int], separator: int) -> list[int]:
    first = list(ids).index(separator)
    return [int(i > first) for i in range(len(ids))]
