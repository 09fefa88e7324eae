"""Convert examples to rows for an encoder-based scorer; see `reward_models.paired`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from align.core.errors import DataError
from align.core.types import Example, PairRow, Text, TokenRow
from align.data.render.chat import is_tie
from align.data.render.content import check_plain
from reward_models.paired import pair_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairedFormat:
    """Render rated responses and pairs of responses as pairs of texts for an encoder.

    It has the methods of `ChatFormat` that are needed for a scorer's rows. The response and the
    separator after it count as trained; there are no stop tokens.

    Args:
        tokenizer: the encoder's tokenizer.
    """

    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def sft_row(self, example: Example) -> TokenRow:
        """Return the tokenized prompt and completion.

        Raises:
            DataError: there is no completion, or the row has parts that an encoder does not read.
        """
        check_plain(example, reader="an encoder")
        return self._row(example.prompt, example.completion, source=example.source)

    def pair_row(self, example: Example) -> PairRow:
        """Return both responses tokenized, each after the prompt.

        Raises:
            DataError: a response is missing, both have the same tokens, or parts would not be read.
        """
        check_plain(example, reader="an encoder")
        chosen = self._row(example.prompt, example.completion, source=example.source)
        rejected = self._row(example.prompt, example.rejected, source=example.source)
        if chosen.input_ids == rejected.input_ids:
            raise DataError(f"{example.source}: chosen and rejected have the same tokens")
        return PairRow(
            chosen=chosen,
            rejected=rejected,
            num_prompt_tokens=chosen.trained.index(True),
            margin=example.margin or 0.0,
            source=example.source,
            tie=is_tie(example),
            label_prob=example.label_prob,
            # An encoder's prompt attends to the response, so it cannot be computed once for both.
            shared=False,
        )

    def _row(self, prompt: Text, completion: Text | None, *, source: str) -> TokenRow:
        if not completion:
            raise DataError(f"{source}: there is no completion to score")
        ids, start = pair_ids(self.tokenizer, prompt, completion)
        return TokenRow(tuple(ids), tuple(i >= start for i in range(len(ids))), source)
