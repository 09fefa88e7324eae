"""Turn examples into rows for a scorer that is an encoder; see `reward_models.paired`."""

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
    """Render judged answers and pairs of answers as pairs of texts.

    It has those methods of `ChatFormat` that a scorer's rows are made with. Of a row the answer and
    the separator behind it count as trained; nothing is a stop token.

    Args:
        tokenizer: the encoder's.
    """

    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of token ids without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def sft_row(self, example: Example) -> TokenRow:
        """Tokenise prompt and completion.

        Raises:
            DataError: there is no completion, or more than an encoder reads.
        """
        check_plain(example, reader="an encoder")
        return self._row(example.prompt, example.completion, source=example.source)

    def pair_row(self, example: Example) -> PairRow:
        """Tokenise both answers, each with the prompt before it.

        Raises:
            DataError: an answer is missing, both have the same tokens, or more than is read.
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
            shared=False,
        )

    def _row(self, prompt: Text, completion: Text | None, *, source: str) -> TokenRow:
        if not completion:
            raise DataError(f"{source}: there is no completion to judge")
        ids, start = pair_ids(self.tokenizer, prompt, completion)
        return TokenRow(tuple(ids), tuple(i >= start for i in range(len(ids))), source)
