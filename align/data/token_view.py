"""Show a row token by token: which tokens are trained or masked, and where generation stops."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from rich.text import Text

from align.core.text import visible
from align.core.types import Example, TokenRow
from align.data.render.chat import ChatFormat
from align.data.render.encoder_pairs import PairedFormat

State = Literal["masked", "trained", "stop"]
_STYLES = {"masked": "dim", "trained": "green", "stop": "bold white on red"}
_CLASSES = {"masked": "mask", "trained": "train", "stop": "stop"}
LEFT_OUT = "left out"
"""State of the entry, in a plain view, that counts the tokens not shown."""
NUM_SHOWN = 2
"""Number of rows in the token view of a stage."""
_AROUND, _AT_END = 48, 8


@dataclass(frozen=True, slots=True)
class Token:
    """One token with its id and text; ``state`` is ``stop`` for a trained stop token."""

    id: int
    text: str
    state: State


@dataclass(frozen=True, slots=True)
class View:
    """The tokens of one side of a row (``row``, ``chosen``, ``rejected`` or ``prompt``)."""

    source: str
    side: str
    tokens: tuple[Token, ...]

    def counts(self) -> dict[str, int]:
        """Return the number of tokens in each state."""
        return {state: sum(t.state == state for t in self.tokens) for state in _STYLES}


def views(example: Example, chat: ChatFormat) -> Iterator[View]:
    """Yield the views of an example: one for an sft row or a bare prompt, two for a pair.

    Raises:
        DataError: the template or the tokenizer rejects the row.
    """
    if example.rejected is not None:
        pair = chat.pair_row(example)
        rows = {"chosen": pair.chosen, "rejected": pair.rejected}
    elif example.completion is None:
        ids = chat.prompt_row(example).input_ids
        rows = {"prompt": TokenRow(ids, (False,) * len(ids), example.source)}
    else:
        rows = {"row": chat.sft_row(example)}
    for side, row in rows.items():
        yield view_of(row, chat, side=side)


def view_of(row: TokenRow, chat: ChatFormat | PairedFormat, *, side: str) -> View:
    """Return the view of a row that is already tokenized."""
    return View(row.source, side, tuple(_tokens(row, chat)))


def _tokens(row: TokenRow, chat: ChatFormat | PairedFormat) -> Iterator[Token]:
    """Yield the tokens, decoding only complete text so that no character is split."""
    start, before = 0, ""
    for i, token in enumerate(row.input_ids):
        # A byte-level token may hold a part of a character: wait until the text is complete.
        whole = str(chat.tokenizer.decode(list(row.input_ids[start : i + 1])))
        text = "" if whole.endswith("\ufffd") else whole[len(before) :]
        if text:
            before = whole
        if len(before) > 200:  # restart now and then: decoding time grows with the text
            start, before = i + 1, ""
        trained = row.trained[i]
        stops = trained and token in chat.stop_token_ids
        yield Token(token, text, "stop" if stops else "trained" if trained else "masked")


def headline(view: View) -> str:
    """Return the place of a view and its token counts."""
    counts = ", ".join(f"{count} {state}" for state, count in view.counts().items())
    return f"{view.source} {view.side}: {len(view.tokens)} tokens, {counts}"


def as_text(view: View, *, colour: bool) -> Text:
    """Return the tokens for a terminal; without colors, trained tokens are in [brackets].

    A stop token is marked with a dagger and a line break with an arrow.
    """
    text = Text()
    last: State = "masked"
    for token in view.tokens:
        shown = visible(token.text).replace("\n", "\u21b5\n") + "\u2020" * (token.state == "stop")
        if not colour and (token.state == "masked") != (last == "masked"):
            text.append("]" if token.state == "masked" else "[")
        text.append(shown, style=_STYLES[token.state])
        last = token.state
    return text if colour or last == "masked" else text.append("]")


def plain(view: View) -> dict[str, Any]:
    """Return a view as plain data for JSON: place, counts of all tokens, and the relevant tokens.

    For a long row, these are the tokens around the first trained one and the last few. Between them
    is an entry [number of tokens, "left out"].
    """
    tokens = view.tokens
    start = next((i for i, t in enumerate(tokens) if t.state != "masked"), len(tokens))
    shown = [abs(i - start) <= _AROUND or i >= len(tokens) - _AT_END for i in range(len(tokens))]
    parts: list[list[Any]] = []
    for keep, group in groupby(range(len(tokens)), key=shown.__getitem__):
        places = list(group)
        if keep:
            parts += [[tokens[i].text, tokens[i].state] for i in places]
        else:
            parts.append([len(places), LEFT_OUT])
    return {"source": view.source, "side": view.side, "counts": view.counts(), "tokens": parts}


def as_html(view: View) -> str:
    """Return the tokens as one HTML fragment: spans of class ``mask``, ``train`` and ``stop``."""
    spans = "".join(
        f'<span class="{_CLASSES[token.state]}" title="{token.id}">{html.escape(token.text)}</span>'
        for token in view.tokens
    )
    return (
        f'<figure class="tokens"><figcaption>{html.escape(headline(view))}</figcaption>'
        f"<pre>{spans}</pre></figure>"
    )
