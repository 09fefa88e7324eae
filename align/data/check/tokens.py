"""Check tokenized rows with the tokenizer of a model."""

import re
from typing import Any

from align.core.errors import DataError
from align.core.types import Example, PairRow, PromptRow, TokenRow
from align.data.fit import fit_row
from align.data.formats.faults import Fault
from align.data.render.chat import ChatFormat

Tokenized = TokenRow | PairRow | PromptRow


class TokenRules:
    """Render rows as a stage would and compare their lengths with ``max_length``.

    Args:
        chat: the renderer.
        max_length: tokens, or None.
        kind: what the rows are used for.
    """

    def __init__(self, chat: ChatFormat, max_length: int | None, kind: str) -> None:
        self._chat, self._max_length, self._kind = chat, max_length, kind
        # Longest first, so that a token is not taken for another one that it begins with.
        tokens = sorted(set(chat.tokenizer.all_special_tokens), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def render(self, example: Example) -> Tokenized:
        """Tokenize an example for its kind.

        Raises:
            DataError: the template or the tokenizer rejects it.
        """
        if self._kind == "preference":
            return self._chat.pair_row(example)
        if self._kind in ("prompts", "math"):
            return self._chat.prompt_row(example)
        return self._chat.sft_row(example)

    def look(self, example: Example) -> tuple[int, Fault | None]:
        """Return the number of tokens of an example (of its longer side) and its fault, if any."""
        try:
            row: Any = self.render(example)
        except DataError as error:
            return 0, (error.code or "D113", str(error).removeprefix(f"{example.source}: "))
        length, prompt = _lengths(row)
        limit = self._max_length
        if limit is None or fit_row(row, max_length=limit) is not None:
            return length, None
        if prompt >= limit:
            return length, ("D111", f"the prompt takes {prompt} tokens, max_length is {limit}")
        return length, ("D110", f"{length} tokens, max_length is {limit}")


def _lengths(row: Tokenized) -> tuple[int, int]:
    """Return the number of tokens of a row and the number before its first trained one."""
    if isinstance(row, PairRow):
        return max(len(row.chosen.input_ids), len(row.rejected.input_ids)), row.num_prompt_tokens
    if isinstance(row, PromptRow):
        return len(row.input_ids), len(row.input_ids)
    return len(row.input_ids), row.trained.index(True)
