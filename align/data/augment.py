"""Reword the user turns of training rows as a pure function of (seed, row, epoch)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, overload

from align.core.distributed import derive_seed
from align.core.types import Example, Text, TokenRow
from align.recipe.schema import AugmentSpec


def augment(example: Example, spec: AugmentSpec, *, seed: int, index: int, epoch: int) -> Example:
    """Return an example with its user turns reworded for one epoch; other turns are unchanged.

    Each word of a user turn is dropped with probability ``word_dropout``, but at least one word is
    kept. The result is then inserted into one of ``templates``. Words are separated by white space.

    Args:
        example: one row.
        spec: the augmentation settings.
        seed: seed of the stage.
        index: number of the row.
        epoch: counted from 0.
    """
    dice = _Draws(seed, index, epoch)
    return replace(
        example,
        prompt=_reworded(example.prompt, spec, dice),
        completion=_reworded(example.completion, spec, dice, plain=False),
    )


def _reworded(text: Text | None, spec: AugmentSpec, dice: "_Draws", *, plain: bool = True) -> Any:
    if text is None or isinstance(text, str):
        return _said(text, spec, dice) if plain and text else text
    return [
        {**turn, "content": _said(turn["content"], spec, dice)} if turn["role"] == "user" else turn
        for turn in text
    ]


def _said(text: str, spec: AugmentSpec, dice: "_Draws") -> str:
    if spec.word_dropout:
        words = text.split()
        # One draw per word, so that a text that gets shorter does not shift the draws of other
        # rows.
        kept = [word for word in words if dice.next() >= spec.word_dropout]
        # Text without a dropped word keeps its own white space.
        if len(kept) < len(words):
            text = " ".join(kept or words[:1])
    if spec.templates:
        text = spec.templates[int(dice.next() * len(spec.templates))].replace("{text}", text)
    return text


class _Draws:
    """Random numbers in [0, 1) that depend only on the row and the epoch."""

    def __init__(self, *place: int) -> None:
        self._place, self._count = place, 0

    def next(self) -> float:
        """Return the next number."""
        seed, *where = self._place
        self._count += 1
        # 53 bits are what a float holds exactly.
        return (derive_seed(seed, "augment", *where, self._count) % 2**53) / 2**53


class AugmentedRows(Sequence[TokenRow]):
    """Tokenized rows that are reworded in each epoch.

    Indexing the sequence returns the original rows. If a reworded row is longer than
    ``max_length``, the original row is trained instead.

    Args:
        rows: the original tokenized rows, in the order of the training data.
        examples: the example from which each row was made.
        render: tokenizes an example.
        spec: the augmentation settings.
        seed: seed of the stage.
        max_length: tokens.
    """

    def __init__(
        self,
        rows: Sequence[TokenRow],
        examples: Sequence[Example],
        *,
        render: Callable[[Example], TokenRow],
        spec: AugmentSpec,
        seed: int,
        max_length: int,
    ) -> None:
        assert len(rows) == len(examples), (len(rows), len(examples))
        self._rows, self._examples, self._render = rows, examples, render
        self._spec, self._seed, self._max_length = spec, seed, max_length

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenRow]: ...
    def __getitem__(self, index: int | slice) -> TokenRow | Sequence[TokenRow]:
        """Return the original rows."""
        return self._rows[index]

    def in_epoch(self, index: int, epoch: int) -> TokenRow:
        """Return one row as it is reworded in an epoch."""
        example = self._examples[index]
        row = self._render(augment(example, self._spec, seed=self._seed, index=index, epoch=epoch))
        return row if len(row.input_ids) <= self._max_length else self._rows[index]
